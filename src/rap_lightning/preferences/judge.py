"""The base class of judges, which give rewards to responses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Message
from rap_lightning.preferences.scales import for_unbounded


@dataclass(frozen=True)
class Item:
    """A response to be judged; ``id`` is a digest of the conversation and the response."""

    id: str
    history: tuple[Message, ...]
    response: str


@dataclass(frozen=True)
class Verdict:
    """A judge's answer for an item.

    Attributes:
        id: of the item.
        overall: the reward, on the judge's own scale.
        attributes: further rewards by name.
        notes: anything else to keep, in plain values.
        error: why there is no reward; the next run judges such items again.
    """

    id: str
    overall: float = math.nan
    attributes: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Judge(ABC):
    """Give rewards to responses. Pass a class by import path: ``--judge my_pkg.MyJudge``.

    Attributes:
        scale: lowest and highest reward that it can give; None if there is no limit.
        counts: how often what happened while judging, in words.
    """

    scale: tuple[float, float] | None = None

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return everything that changes rewards, in plain values."""

    @abstractmethod
    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """Yield lists of verdicts as they are ready, one verdict for each item."""


def declared(scale: list[float] | None) -> tuple[float, float] | None:
    """Return the scale of an option: two ends, lowest first."""
    if scale is None:
        return None
    if len(scale) != 2 or not scale[0] < scale[1]:
        raise ConfigError(f"--judge.scale: expected the lowest and the highest reward, such as [1, 10]; found {scale}")
    return scale[0], scale[1]


def rated_goal(judge: Judge | None, goal: GoalTemplate | None) -> GoalTemplate | None:
    """Return the goal template for data with a judge's rewards, with a scale that fits a judge without a range."""
    if judge is None or goal is None:
        return goal
    if goal.attributes:
        raise ConfigError(
            f"{type(goal).__name__} states {', '.join(goal.attributes)}, and {type(judge).__name__} gives one reward. "
            "Score the data beforehand (rap-lightning score), or use OverallGoal."
        )
    if judge.scale is not None:
        return goal
    return goal.with_scale(for_unbounded(goal.scale))
