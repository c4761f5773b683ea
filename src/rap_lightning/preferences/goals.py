"""Goals: the reward asked for, and how it is written into the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from rap_lightning.errors import ConfigError

Placement = Literal["auto", "system", "user"]


@dataclass(frozen=True)
class RewardScale:
    """The judge's scale.

    Args:
        low: the lowest reward the judge can give.
        high: the highest; the goal asked for at inference.
        decimals: goals are printed with at most this many decimals, without trailing zeros ("7.5", "8").
    """

    low: float = 1.0
    high: float = 10.0
    decimals: int = 1

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"reward scale: low must be below high, found low={self.low}, high={self.high}")
        if not 0 <= self.decimals <= 6:
            raise ConfigError(f"reward scale: decimals must be from 0 to 6, found {self.decimals}")

    def __contains__(self, reward: float) -> bool:
        return self.low <= reward <= self.high

    def printed(self, reward: float) -> str:
        """The reward as the prompt states it.

        >>> RewardScale().printed(8.0), RewardScale().printed(7.46)
        ('8', '7.5')
        """
        text = f"{reward:.{self.decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text


class GoalTemplate(ABC):
    """How a goal reads. Subclass it and name the class by import path: ``--data.goal my_pkg.MyGoal``.

    Args:
        scale: the judge's scale.
        placement: ``system`` writes the goal as the system message, ``user`` before the first user turn, and ``auto``
            picks ``system`` where the chat template shows a system message, found by rendering one.
    """

    def __init__(self, scale: RewardScale = RewardScale(), placement: Placement = "auto") -> None:
        self.scale, self.placement = scale, placement

    @abstractmethod
    def text(self, reward: float) -> str:
        """The text that asks for ``reward``."""

    @property
    def best(self) -> float:
        """The goal to ask for at inference: the top of the scale."""
        return self.scale.high

    def printed(self, reward: float) -> str:
        """The reward as the text states it; two rewards that print the same are one goal."""
        return self.scale.printed(reward)

    def describe(self) -> str:
        """What the template writes for 201 rewards over the scale, for cache keys."""
        step = (self.scale.high - self.scale.low) / 200
        rewards = [self.scale.low + step * i for i in range(201)]
        texts = [(self.printed(reward), self.text(reward)) for reward in rewards]
        return f"{type(self).__module__}.{type(self).__qualname__} {self.scale} {self.placement} {texts}"


class OverallGoal(GoalTemplate):
    """The goal text of the paper (Zhang et al., ICML 2025, arXiv 2410.08067): one overall score.

    >>> print(OverallGoal().text(7.5))
    You are an assistant that generates responses for the instruction while implicitly achieving the following \
target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):
    Overall score: 7.5.
    """

    def text(self, reward: float) -> str:
        """The paper's sentence with the scale's ends and the printed reward."""
        low, high = self.scale.printed(self.scale.low), self.scale.printed(self.scale.high)
        return (
            "You are an assistant that generates responses for the instruction while implicitly achieving the "
            f"following target scores (on a scale of {low}-{high}, where {low} is lowest and {high} is highest):\n"
            f"Overall score: {self.printed(reward)}."
        )
