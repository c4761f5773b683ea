"""What every judge is: something that gives responses their rewards."""

from __future__ import annotations

import copy
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
    """A response to be judged: ``id`` is a digest of the conversation and the response."""

    id: str
    history: tuple[Message, ...]
    response: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an item.

    Attributes:
        id: of the item.
        overall: the reward, on the judge's own scale.
        attributes: further rewards by name.
        notes: whatever else is worth keeping, in plain values.
        error: why there is no reward; such items are judged again by the next run.
    """

    id: str
    overall: float = math.nan
    attributes: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Judge(ABC):
    """Gives rewards. Named by import path: ``--judge my_pkg.MyJudge``.

    Attributes:
        scale: lowest and highest reward it can give; None where it has no ends.
        counts: what happened on the way, in words.
    """

    scale: tuple[float, float] | None = None

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that changes rewards, in plain values."""

    @abstractmethod
    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """Verdicts, some at a time, as they are ready; one for each item."""


def declared(scale: list[float] | None) -> tuple[float, float] | None:
    """A scale as an option gives it: two ends, lowest first."""

    if scale is None:
        return None
    if len(scale) != 2 or not scale[0] < scale[1]:
        raise ConfigError(f"--judge.scale: expected the lowest and the highest reward, [1, 10] say; found {scale}")
    return scale[0], scale[1]


def rated_goal(judge: Judge | None, goal: GoalTemplate | None) -> GoalTemplate | None:
    """The goal for data that a judge gives their rewards: its scale maps those of a judge without ends.

    Raises:
        ConfigError: the goal states attributes, for which there would be no rewards.
    """
    if judge is None or goal is None:
        return goal
    if goal.attributes:
        raise ConfigError(
            f"{type(goal).__name__} states {', '.join(goal.attributes)}, and {type(judge).__name__} gives one reward "
            "here. Score the data beforehand (rap-lightning score), or use OverallGoal."
        )
    if judge.scale is not None:
        return goal
    goal = copy.copy(goal)
    goal.scale = for_unbounded(goal.scale)
    return goal
