"""The options of reading: how rows become scored pairs, and the cache key of these options."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.formats import FORMATS
from rap_lightning.preferences.formats.base import Adapter
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.hashing import describe_object, hash_code
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.selection import BestVsRandom, Selection
from rap_lightning.preferences.thoughts import Thinking


@dataclass(frozen=True)
class Rules:
    """How rows become scored pairs; the other options are those of :class:`ReadingOptions`.

    A damaged file, or one that changes its types between rows, stops a run for every value of ``bad_rows``.

    Args:
        goal: the goal template; None for plain pairs, which need no scores.
        rewards: a judge's rewards, which replace the scores of the data.
        blind: ignore the scores of the data, because a judge will replace them.
        thinking: what becomes of thoughts in responses.
        weight_column: the column with the weight of a row's pairs, by its name after ``columns``.
    """

    goal: GoalTemplate | None = field(default_factory=OverallGoal)
    relabelling: Relabelling = field(default_factory=Relabelling)
    ties: Literal["drop", "chosen", "error"] = "drop"
    selection: Selection | None = None
    filters: Filters = field(default_factory=Filters)
    outside_scale: Literal["error", "drop", "clip"] = "error"
    bad_rows: Literal["drop", "error"] = "drop"
    format: str = "auto"
    columns: dict[str, str] | None = None
    tool_turns: bool = False
    rewards: RewardTable | None = None
    blind: bool = False
    thinking: Thinking = "keep"
    weight_column: str | None = None

    def __post_init__(self) -> None:
        for option, least in (("outside_scale", "error"), ("ties", "drop")):
            if self.goal is None and getattr(self, option) != least:
                raise ConfigError(
                    f"{option} {getattr(self, option)} has no effect without a goal; remove one of the two."
                )
        if self.goal is None and self.relabelling.conditioned:
            raise ConfigError(
                f"relabel {self.relabelling.mode} needs a goal; use relabel none, or name a goal template."
            )
        if self.goal is not None and self.relabelling.goals_per_pair:
            self.goal.scale.check_inverse()
        if self.ties == "chosen" and not self.relabelling.of_ties:
            raise ConfigError(f"ties chosen has no effect with relabel {self.relabelling.mode}; remove one of the two.")
        if self.goal is not None and self.outside_scale != "error" and self.goal.scale.judge_range[0] == float("-inf"):
            raise ConfigError(
                f"outside_scale {self.outside_scale} has no effect with {type(self.goal.scale).__name__}, which states "
                "rewards beyond an end as that end; remove it."
            )

    @property
    def scored(self) -> bool:
        return self.goal is not None and self.rewards is None

    @property
    def names(self) -> dict[str, str]:
        """Our column name -> its name in the source, for renamed columns."""
        return {ours: theirs for theirs, ours in (self.columns or {}).items()}

    def unscored(self) -> Rules:
        """Return rules that read the same rows without their scores, and select, filter and relabel nothing."""
        return Rules(
            None, Relabelling("none"), bad_rows=self.bad_rows, format=self.format, columns=self.columns,
            tool_turns=self.tool_turns, blind=True, thinking=self.thinking,
        )  # fmt: skip

    def describe(self) -> str:
        """Return everything that changes the pairs, for cache keys."""
        goal = self.goal.describe() if self.goal is not None else None
        selection = describe_object(self.selection or BestVsRandom())
        known = self.format in ("auto", *(kind.name for kind in FORMATS))
        adapter = self.format if known else hash_code(adapter_of(self.format))
        options = (
            self.relabelling, self.ties, selection, self.filters.describe(), self.outside_scale, self.bad_rows, adapter,
            self.columns, self.tool_turns, self.thinking, self.weight_column,
        )  # fmt: skip
        rewards = self.rewards.describe() if self.rewards is not None else None
        return repr((goal, options, rewards, self.blind))


def adapter_of(path: str) -> Adapter:
    """Import a user's function that converts a row into one of a known format."""
    module, _, name = path.rpartition(".")
    known = ", ".join(kind.name for kind in FORMATS)
    if not module:
        raise ConfigError(f"format: expected auto, {known}, or the import path of a function; found {path!r}.")
    try:
        function: Adapter = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"format: {path} can't be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"format: {path} is not a function of a row.")
    return function


def key_of(rules: Rules, prints: Sequence[str]) -> str:
    """Return a digest of everything that changes the pairs of sources with these fingerprints."""
    return hashlib.sha256(json.dumps([rules.describe(), *prints]).encode()).hexdigest()[:16]
