"""What is done with rows on the way to pairs."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences import fingerprint as codekeys
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.formats import FORMATS
from rap_lightning.preferences.formats.base import Row
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.selection import BestVsRandom, Selection


@dataclass(frozen=True)
class Rules:
    """What is done with rows on the way to pairs.

    Args:
        goal: the goal template; None for plain pairs, which need no scores.
        relabelling: what each pair becomes.
        ties: a pair whose goals print the same: ``drop`` it, keep its ``chosen`` half, or stop with an ``error``.
        selection: of pairs from several responses; None is best against random.
        filters: what is left out on purpose.
        outside_scale: scores outside the goal's scale: stop with an ``error``, ``drop`` such pairs or responses, or
            ``clip`` them to the nearest end.
        bad_rows: rows that can't be used (an empty response, a missing score): ``drop`` and count them, or stop with an
            ``error``. A file that is broken or not what its first rows say stops in either case.
        format: of the rows: ``auto``, the name of a format, or the import path of a function that turns a row into one
            of a known format.
        columns: new names for columns: {theirs: ours}.
        tool_turns: keep conversations with tool calls; without a chat template that shows them they can't be used.
        rewards: a judge's, in the place of the scores that the data have or lack.
        blind: scores are not looked at, whatever stands there: for a judge that is yet to give its own.
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
        if self.ties == "chosen" and not self.relabelling.of_ties:
            raise ConfigError(f"ties chosen has no effect with relabel {self.relabelling.mode}; remove one of the two.")
        if self.goal is not None and self.outside_scale != "error" and self.goal.scale.judge_range[0] == float("-inf"):
            raise ConfigError(
                f"outside_scale {self.outside_scale} has no effect with {type(self.goal.scale).__name__}, which states "
                "every reward by its nearest end; remove it."
            )

    @property
    def scored(self) -> bool:
        """Whether rows must have scores."""
        return self.goal is not None and self.rewards is None

    @property
    def names(self) -> dict[str, str]:
        """What the source calls columns that were renamed, by our name."""
        return {ours: theirs for theirs, ours in (self.columns or {}).items()}

    def unscored(self) -> Rules:
        """The same rows, whatever scores they have: nothing is selected, filtered or relabelled."""
        return Rules(
            None, Relabelling("none"), bad_rows=self.bad_rows, format=self.format, columns=self.columns,
            tool_turns=self.tool_turns, blind=True,
        )  # fmt: skip

    def describe(self) -> str:
        """Everything that changes the pairs, for cache keys."""
        goal = self.goal.describe() if self.goal is not None else None
        selection = codekeys.describe(self.selection or BestVsRandom())
        known = self.format in ("auto", *(kind.name for kind in FORMATS))
        adapter = self.format if known else codekeys.code_of(adapter_of(self.format))
        options = (
            self.relabelling, self.ties, selection, self.filters.describe(), self.outside_scale, self.bad_rows, adapter,
            self.columns, self.tool_turns,
        )  # fmt: skip
        if self.rewards is not None:
            return repr((goal, options, self.rewards.describe()))
        if self.blind:
            return repr((goal, options, "blind"))
        return repr((goal, options))


def adapter_of(path: str) -> Callable[[Row], Row | None]:
    """The function of a user that makes a row of a known format.

    Raises:
        ConfigError: there is none at this import path.
    """
    module, _, name = path.rpartition(".")
    known = ", ".join(kind.name for kind in FORMATS)
    if not module:
        raise ConfigError(f"format: expected auto, {known}, or the import path of a function; found {path!r}.")
    try:
        function: Callable[[Row], Row | None] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"format: {path} can't be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"format: {path} is not a function of a row.")
    return function


def key_of(rules: Rules, prints: Sequence[str]) -> str:
    """Digest of everything that changes the pairs made of sources with these fingerprints."""
    return hashlib.sha256(json.dumps([rules.describe(), *prints]).encode()).hexdigest()[:16]
