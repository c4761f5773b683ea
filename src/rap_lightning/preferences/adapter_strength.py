"""A goal that is not text: the strength of the policy's LoRA adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal, Self

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goal_spec import Wording
from rap_lightning.preferences.goals import GoalTemplate, StatedGoal
from rap_lightning.preferences.scales import QuantileScale, RewardScale

Neutral = float | list[float] | Literal["middle", "mean", "ranks"]


class AdapterStrength(GoalTemplate):
    """The goal as a factor on the LoRA adapter: weights W + s(goal) BA, and the same prompt under every goal.

    The strength s is -1 at the lowest goal of the scale, 0 where the policy is the base model, and 1 at the highest. It
    extends beyond the scale, so that goals that training never stated can be asked for.

    Args:
        scale: the judge's scale, and the numbers of goals; by default that of ``prompt``, or 1 to 10.
        neutral: the goal of strength 0, from which it is linear to either end: a number, the middle of the scale, or
            the mean of the training split's goals, which for responses of the base model is what that model reaches.
            ranks sets the strength by rank among the training split's goals instead: its median has strength 0. (Its
            quantiles, a list, are what a run records.)
        prompt: a goal template whose text is written into the prompt as well.

    >>> goal = AdapterStrength(neutral=4.0)
    >>> [goal.strength(number) for number in (1.0, 4.0, 7.0, 10.0, 13.0)]
    [-1.0, 0.0, 0.5, 1.0, 1.5]
    """

    def __init__(
        self, scale: RewardScale | None = None, neutral: Neutral = "mean", prompt: GoalTemplate | None = None
    ) -> None:
        if prompt is not None and scale is not None and scale != prompt.scale:
            raise ConfigError(f"AdapterStrength: scale is {scale}, and that of prompt is {prompt.scale}. Give one.")
        if isinstance(prompt, AdapterStrength):
            raise ConfigError("AdapterStrength: prompt must be a template of text, such as OverallGoal.")
        scale = prompt.scale if prompt is not None else RewardScale() if scale is None else scale
        super().__init__(scale, "auto" if prompt is None else prompt.placement)
        self.neutral, self.prompt = neutral, prompt
        self.attributes = () if prompt is None else prompt.attributes
        self.adapter_at = 1.0  # the strength at which the weights of the adapter in use were written
        self._check()

    def _check(self) -> None:
        """Raise ConfigError where the ends of the scale have no strengths of different sign."""
        if isinstance(self.neutral, list):
            QuantileScale(-1.0, 1.0, knots=self.neutral)
            if not self.strength(self.best) > 0:
                raise ConfigError(
                    f"AdapterStrength: the best goal, {self.printed(self.best)}, has strength "
                    f"{self.strength(self.best):.3g}: most rewards are equal to it. Use neutral mean, or a number."
                )
        elif not isinstance(self.neutral, str) and not self.scale.low < self.neutral < self.scale.high:
            raise ConfigError(
                f"AdapterStrength: neutral must be inside of the scale from {self.scale.low:g} to "
                f"{self.scale.high:g}, found {self.neutral:g}"
            )

    def strength(self, goal: float) -> float:
        """Return the factor on the adapter for a goal."""
        low, high, zero = self.scale.low, self.scale.high, self.neutral
        assert zero not in ("mean", "ranks"), "call fit first"
        if isinstance(zero, list):
            inside = min(max(goal, low), high)
            return QuantileScale(-1.0, 1.0, knots=zero).goal(inside) + 2 * (goal - inside) / (high - low)
        middle = (low + high) / 2 if isinstance(zero, str) else zero
        return (goal - middle) / (high - middle if goal > middle else middle - low)

    def state(self, goal: float, attributes: Sequence[float] = ()) -> StatedGoal:
        """Return the strength, with the text of ``prompt``, if any."""
        text = None if self.prompt is None else self.prompt.state(goal, attributes).text
        return StatedGoal(text, self.strength(goal) / self.adapter_at)

    @property
    def unstated(self) -> StatedGoal:
        """The base model: strength 0."""
        return StatedGoal(None, 0.0)

    def refuse_outside(self, goal: float, option: str, instead: str = ",") -> str | None:
        """Return a note for a goal beyond the scale; text can't be asked for there.

        Raises:
            ConfigError: it is no number, or ``prompt`` can't state it.
        """
        low, high = self.scale.low, self.scale.high
        if self.prompt is not None or not math.isfinite(goal):
            return super().refuse_outside(goal, option, instead)
        if low <= goal <= high:
            return None
        return (
            f"note: {option} {goal:g} is outside of the scale from {low:g} to {high:g}, on which the policy was "
            f"trained: the adapter's strength is extrapolated to {self.strength(goal):.3g}."
        )

    @property
    def needs_fit(self) -> bool:
        return self.scale.needs_fit or self.neutral in ("mean", "ranks")

    def fit(self, rewards: Sequence[float]) -> None:
        if self.scale.needs_fit:
            self.scale.fit(rewards)
        goals = [self.scale.goal(reward) for reward in rewards]
        if self.neutral == "mean":
            self.neutral = fmean(goals)
        elif self.neutral == "ranks":
            ranks = QuantileScale(-1.0, 1.0)
            ranks.fit(goals)
            self.neutral = ranks.knots or []
        self._check()

    def fitted(self) -> str:
        low, high = (self.strength(goal) for goal in (self.scale.low, self.scale.high))
        zero = f"{self.neutral:g}" if isinstance(self.neutral, float | int) else "the median"
        return f"{self.scale}, strength {low:.3g} at its low end, 0 at {zero}, {high:.3g} at its high end"

    def with_scale(self, scale: RewardScale) -> Self:
        other = copy.copy(self)
        other.scale, other.prompt = scale, None if self.prompt is None else self.prompt.with_scale(scale)
        return other

    def describe(self) -> str:
        text = None if self.prompt is None else self.prompt.describe()
        step = (self.scale.high - self.scale.low) / 200
        strengths = None if self.needs_fit else [self.strength(self.scale.low + step * i) for i in range(201)]
        return f"{super().describe()} {text} {strengths}"

    def record(self) -> dict[str, Any]:
        """Return also where strength 0 is, the best goal's strength, and that of the adapter's weights as they are."""
        numbers = {"neutral": self.neutral, "strength": self.strength(self.best), "adapter_at": self.adapter_at}
        record = super().record() | numbers
        if self.prompt is None:
            return record | {"best": None, "prompt": None}
        return record | {"prompt": self.prompt.record()}

    # -- text, if any -------------------------------------------------------------------------------------------------

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        """Return the text of ``prompt``; empty without one."""
        return "" if self.prompt is None else self.prompt.write(goal, attributes)

    def goal_of(self, reward: float, attributes: Sequence[float] = ()) -> tuple[float, tuple[float, ...]]:
        return super().goal_of(reward, attributes) if self.prompt is None else self.prompt.goal_of(reward, attributes)

    def attributes_at(self, share: float) -> tuple[float, ...]:
        return () if self.prompt is None else self.prompt.attributes_at(share)

    @property
    def best_attributes(self) -> tuple[float, ...]:
        return () if self.prompt is None else self.prompt.best_attributes

    def printed(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return super().printed(goal) if self.prompt is None else self.prompt.printed(goal, attributes)

    def wording(self) -> Wording | None:
        return None if self.prompt is None else self.prompt.wording()
