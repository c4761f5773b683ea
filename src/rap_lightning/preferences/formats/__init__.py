"""Row formats: each one reads a row, or a group of rows, into a conversation with judged responses."""

from rap_lightning.preferences.formats.base import Adapted, RowFormat
from rap_lightning.preferences.formats.completions import RankedAnswers, ScoredCompletions
from rap_lightning.preferences.formats.helpsteer import HelpSteer
from rap_lightning.preferences.formats.scored_pairs import ScoredPairs
from rap_lightning.preferences.formats.sharegpt import ShareGPT
from rap_lightning.preferences.formats.ultrafeedback import UltraFeedback

FORMATS: tuple[type[RowFormat], ...] = (
    UltraFeedback,
    ScoredCompletions,
    RankedAnswers,
    HelpSteer,
    ShareGPT,
    ScoredPairs,
)
"""The formats that are detected by their columns, in this order."""

__all__ = ["FORMATS", "Adapted", "RowFormat"]
