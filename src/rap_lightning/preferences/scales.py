"""Reward scales: they map the judge's rewards to the numbers that goals state."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from rap_lightning.errors import ConfigError


def printed(number: float, decimals: int) -> str:
    """Return a number with at most ``decimals`` decimals, without trailing zeros."""
    text = f"{number:.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


class RewardScale:
    """A declared scale: goals state the judge's own numbers.

    Args:
        low: the lowest reward the judge can give.
        high: the highest; the goal asked for at inference.
        decimals: goals are printed with at most this many decimals, without trailing zeros ("7.5", "8").

    >>> scale = RewardScale(1, 5, decimals=2)
    >>> scale.goal(4.25), scale.printed(4.25), scale.best, 5.5 in scale
    (4.25, '4.25', 5.0, False)
    """

    def __init__(self, low: float = 1.0, high: float = 10.0, decimals: int = 1) -> None:
        if not low < high:
            raise ConfigError(f"reward scale: low must be below high, found low={low}, high={high}")
        if not 0 <= decimals <= 6:
            raise ConfigError(f"reward scale: decimals must be from 0 to 6, found {decimals}")
        self.low, self.high, self.decimals = float(low), float(high), decimals

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.numbers().items())})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and repr(other) == repr(self)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __contains__(self, reward: float) -> bool:
        low, high = self.judge_range
        return low <= reward <= high

    @property
    def judge_range(self) -> tuple[float, float]:
        """Lowest and highest reward on the scale, in the judge's units."""
        return self.low, self.high

    @property
    def best(self) -> float:
        """The highest number that a goal states."""
        return self.high

    @property
    def best_reward(self) -> float:
        """The lowest reward that is stated as the best goal, in the judge's units."""
        return self.judge_range[1]

    @property
    def needs_fit(self) -> bool:
        """Whether the training split must supply some of its numbers."""
        return False

    def fit(self, rewards: Sequence[float]) -> None:
        """Set the open numbers from the rewards of the training split, in the judge's units."""
        raise ConfigError(f"{type(self).__name__} has nothing to fit.")

    def goal(self, reward: float) -> float:
        """Return the number that a goal states for a reward."""
        return reward

    def reward(self, goal: float) -> float:
        """Return a reward, in the judge's units, that a goal states: the inverse of :meth:`goal`."""
        return goal

    def check_inverse(self) -> None:
        """Raise ConfigError where a subclass defines another :meth:`goal` and not its inverse."""
        goal, reward = (next(kind for kind in type(self).__mro__ if name in vars(kind)) for name in ("goal", "reward"))
        if not issubclass(reward, goal):
            raise ConfigError(
                f"goals_per_pair: {type(self).__name__} doesn't say which reward a drawn goal asks for. Define its "
                "method reward(goal), the inverse of goal(reward)."
            )

    def numbers(self) -> dict[str, Any]:
        """Return all arguments, including fitted ones, from which the scale can be built again."""
        return {"low": self.low, "high": self.high, "decimals": self.decimals}

    def printed(self, goal: float) -> str:
        """Return a goal's number as the prompt states it.

        >>> RewardScale().printed(8.0), RewardScale().printed(7.46)
        ('8', '7.5')
        """
        return printed(goal, self.decimals)

    def printable(self, share: float) -> float:
        """Return one of the goals that can be printed, from the lowest to the best: that at a share in [0, 1) of them.

        >>> [RewardScale(1, 10, decimals=1).printable(share) for share in (0.0, 0.5, 0.999)]
        [1.0, 5.5, 10.0]
        """
        step = 10.0**-self.decimals
        count = int((self.best - self.low) / step + 1e-6) + 1
        return min(round(self.low + int(share * count) * step, 9), self.best)

    def grid(self, count: int) -> list[float]:
        """Return evenly spaced goals from the lowest to the highest, as printed; fewer if some print alike.

        >>> RewardScale().grid(7)
        [1.0, 2.5, 4.0, 5.5, 7.0, 8.5, 10.0]
        """
        step = (self.high - self.low) / max(count - 1, 1)
        return [float(text) for text in dict.fromkeys(self.printed(self.low + step * i) for i in range(count))]


class LinearScale(RewardScale):
    """A linear map of the judge's range to the numbers that goals state, such as a reward model's -20 to 5 to 1 to 10.

    Args:
        low: the lowest number that goals state.
        high: the highest.
        decimals: as for RewardScale.
        judge_low: lower end of the judge's range; null uses the lowest reward of the training split. Rewards beyond an
            end are stated as that end.
        judge_high: its upper end; null uses the highest reward of the training split.

    >>> scale = LinearScale(judge_low=-20)
    >>> scale.fit([-12.0, 0.0, 5.0])  # the open end, from the training split
    >>> scale.judge_high, [scale.printed(scale.goal(reward)) for reward in (-30.0, -7.5, 5.0)]
    (5.0, ['1', '5.5', '10'])
    """

    def __init__(
        self, low: float = 1.0, high: float = 10.0, decimals: int = 1,
        judge_low: float | None = None, judge_high: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(low, high, decimals)
        if judge_low is not None and judge_high is not None and not judge_low < judge_high:
            raise ConfigError(f"LinearScale: judge_low must be below judge_high, found {judge_low} and {judge_high}")
        self.judge_low, self.judge_high = judge_low, judge_high

    @property
    def judge_range(self) -> tuple[float, float]:
        return float("-inf"), float("inf")

    @property
    def best_reward(self) -> float:
        assert self.judge_high is not None, "call fit first"
        return self.judge_high

    @property
    def needs_fit(self) -> bool:
        return self.judge_low is None or self.judge_high is None

    def fit(self, rewards: Sequence[float]) -> None:
        low = min(rewards) if self.judge_low is None else self.judge_low
        high = max(rewards) if self.judge_high is None else self.judge_high
        if not low < high:
            raise ConfigError(
                f"LinearScale: the training split's rewards, or judge_low and judge_high, give no range: from {low} to "
                f"{high}. Set judge_low and judge_high to the ends of the judge's scale."
            )
        self.judge_low, self.judge_high = float(low), float(high)

    def goal(self, reward: float) -> float:
        assert self.judge_low is not None, "call fit first"
        assert self.judge_high is not None, "call fit first"
        share = (reward - self.judge_low) / (self.judge_high - self.judge_low)
        return self.low + min(1.0, max(0.0, share)) * (self.high - self.low)

    def reward(self, goal: float) -> float:
        assert self.judge_low is not None, "call fit first"
        assert self.judge_high is not None, "call fit first"
        return self.judge_low + (goal - self.low) / (self.high - self.low) * (self.judge_high - self.judge_low)

    def numbers(self) -> dict[str, Any]:
        return super().numbers() | {"judge_low": self.judge_low, "judge_high": self.judge_high}


class QuantileScale(RewardScale):
    """Ranks in the training split: on a scale of 1-10, goal 10 is the best reward there and 5.5 the median.

    For judges whose rewards are unevenly spread or have no fixed range.

    Args:
        low: the lowest number that goals state.
        high: the highest.
        decimals: as for RewardScale.
        knots: the rewards at equally spaced quantiles, lowest first; null uses 101 of the training split.

    >>> scale = QuantileScale()
    >>> scale.fit([rank**4 for rank in range(1001)])  # most of them near the lower end
    >>> [scale.printed(scale.goal(reward)) for reward in (0, 500**4, 1000**4)]
    ['1', '5.5', '10']
    """

    KNOTS = 101

    def __init__(
        self, low: float = 1.0, high: float = 10.0, decimals: int = 1, knots: list[float] | None = None
    ) -> None:
        super().__init__(low, high, decimals)
        if knots is not None and (len(knots) < 2 or sorted(knots) != list(knots) or knots[0] == knots[-1]):
            raise ConfigError("QuantileScale: knots must be at least two numbers, in rising order, not all the same")
        self.knots = knots

    @property
    def judge_range(self) -> tuple[float, float]:
        return float("-inf"), float("inf")

    @property
    def best(self) -> float:
        """The goal of the training split's highest reward: below ``high`` if many responses share that reward."""
        return self.high if self.knots is None else self.goal(self.knots[-1])

    @property
    def best_reward(self) -> float:
        assert self.knots is not None, "call fit first"
        return self.knots[-1]

    @property
    def needs_fit(self) -> bool:
        return self.knots is None

    def fit(self, rewards: Sequence[float]) -> None:
        ordered = sorted(rewards)
        if ordered[0] == ordered[-1]:
            raise ConfigError(f"QuantileScale: all rewards of the training split are {ordered[0]:g}")
        last = len(ordered) - 1
        self.knots = [ordered[round(last * i / (self.KNOTS - 1))] for i in range(self.KNOTS)]

    def goal(self, reward: float) -> float:
        """Return the goal, linear between knots; a value that many rewards share gets the middle of their quantiles."""
        knots = self.knots
        assert knots is not None, "call fit first"
        left, right = bisect.bisect_left(knots, reward), bisect.bisect_right(knots, reward)
        if right == 0 or left == len(knots):
            place = 0.0 if right == 0 else len(knots) - 1.0
        elif left < right:
            place = (left + right - 1) / 2
        else:
            below, above = knots[left - 1], knots[left]
            place = left - 1 + (reward - below) / (above - below)
        return self.low + place / (len(knots) - 1) * (self.high - self.low)

    def reward(self, goal: float) -> float:
        """Return the reward at this quantile; one that many responses share is stated as the middle of its own."""
        assert self.knots is not None, "call fit first"
        place = (goal - self.low) / (self.high - self.low) * (len(self.knots) - 1)
        below = min(int(place), len(self.knots) - 2)
        return self.knots[below] + (place - below) * (self.knots[below + 1] - self.knots[below])

    def numbers(self) -> dict[str, Any]:
        return super().numbers() | {"knots": self.knots}


def for_unbounded(scale: RewardScale) -> RewardScale:
    """Return a scale for rewards without a range: the same numbers, as ranks in the training split.

    A scale that already maps the judge's numbers is returned as it is.
    """
    return QuantileScale(scale.low, scale.high, scale.decimals) if type(scale) is RewardScale else scale
