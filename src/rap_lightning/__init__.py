"""rap-lightning: reward-augmented preference alignment on Lightning.

The public names below are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rap_lightning.datamodule import PreferenceDataModule
    from rap_lightning.losses import DPO, Hinge, PreferenceLoss, SimPO
    from rap_lightning.models.guidance import GoalGuidance
    from rap_lightning.models.references.adapters_off import AdaptersOff
    from rap_lightning.models.references.base import NoReference
    from rap_lightning.models.references.frozen import Frozen
    from rap_lightning.models.references.policy_copy import AdapterAsLoaded
    from rap_lightning.models.references.precomputed import Stored
    from rap_lightning.models.references.synchronised import Synchronised
    from rap_lightning.module import PreferenceModule
    from rap_lightning.preferences.adapter_strength import AdapterStrength
    from rap_lightning.preferences.filters import Filters
    from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal
    from rap_lightning.preferences.relabelling import RelabelledView, relabel
    from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale
    from rap_lightning.preferences.selection import AdjacentPairs, AllPairs, BestVsRandom, BestVsWorst, Selection
    from rap_lightning.preferences.sources import Source

_NAMES = {
    "datamodule": ("PreferenceDataModule",),
    "module": ("PreferenceModule",),
    "losses": ("DPO", "Hinge", "PreferenceLoss", "SimPO"),
    "models.guidance": ("GoalGuidance",),
    "models.references.adapters_off": ("AdaptersOff",),
    "models.references.base": ("NoReference",),
    "models.references.frozen": ("Frozen",),
    "models.references.policy_copy": ("AdapterAsLoaded",),
    "models.references.precomputed": ("Stored",),
    "models.references.synchronised": ("Synchronised",),
    "preferences.adapter_strength": ("AdapterStrength",),
    "preferences.filters": ("Filters",),
    "preferences.goals": ("AttributeGoal", "GoalTemplate", "OverallGoal"),
    "preferences.relabelling": ("RelabelledView", "relabel"),
    "preferences.scales": ("LinearScale", "QuantileScale", "RewardScale"),
    "preferences.selection": ("AdjacentPairs", "AllPairs", "BestVsRandom", "BestVsWorst", "Selection"),
    "preferences.sources": ("Source",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "DPO", "AdapterAsLoaded", "AdapterStrength", "AdaptersOff", "AdjacentPairs", "AllPairs", "AttributeGoal",
    "BestVsRandom", "BestVsWorst", "Filters", "Frozen", "GoalGuidance", "GoalTemplate", "Hinge", "LinearScale",
    "NoReference", "OverallGoal", "PreferenceDataModule", "PreferenceLoss", "PreferenceModule", "QuantileScale",
    "RelabelledView", "RewardScale", "Selection", "SimPO", "Source", "Stored", "Synchronised", "relabel",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
