"""Figures with a confidence interval: the bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Statistic: TypeAlias = Callable[[Floats], Floats]
"""[R, M] weights of M observations -> [R] or [R, K] values; nan if undefined."""

LEVEL = 0.95
RESAMPLES = 2000
MAX_WEIGHTS = 1 << 22  # weights in memory at a time
MIN_DEFINED = 0.9  # fraction of resamples in which a statistic must be defined for an interval


@dataclass(frozen=True)
class Figure:
    """A number, the 95% interval of the percentile bootstrap, the prompts behind it, and why value or ends are None."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    why: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``why`` only if value or interval is missing."""
        return {name: value for name, value in asdict(self).items() if name != "why" or value is not None}

    @classmethod
    def missing(cls, why: str, n: int = 0) -> Figure:
        """Return an undefined figure."""
        return cls(None, n=n, why=why)


class Bootstrap:
    """Resamples prompts, with all their observations.

    A resample in which a prompt was drawn k times is the data with its observations weighted by k, so statistics are
    functions of weights. All figures of one Bootstrap share their resamples.
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13 (percentile interval).

    ``prompts`` identifies the prompt of each of the M observations.
    """

    def __init__(self, prompts: Sequence[Hashable], resamples: int = RESAMPLES, seed: int = 0) -> None:
        numbers: dict[Hashable, int] = {}
        of_prompt = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
        self.prompt_of = np.asarray(of_prompt, dtype=np.int64)
        self.prompts, self.resamples = len(numbers), resamples
        if self.prompts:
            rng = np.random.default_rng(seed)
            even = np.full(self.prompts, 1 / self.prompts)
            self._counts = rng.multinomial(self.prompts, even, size=resamples).astype(np.float64)

    def figure(self, statistic: Statistic, why: str, among: Mask | None = None) -> Figure:
        """Return a statistic with its interval; ``why`` if it is undefined, ``among`` [M] are the observations used."""
        return self.figures(lambda weights: statistic(weights)[:, None], 1, why, [among])[0]

    def figures(
        self, statistic: Statistic, count: int, why: str, among: Sequence[Mask | None] | None = None
    ) -> list[Figure]:
        """Return the ``count`` values of a statistic ([R, M] -> [R, count]), each with its interval.

        ``among`` has the observations that each value uses, to count their prompts.
        """
        if not self.prompts:
            return [Figure.missing(why)] * count
        values = self.value(statistic)
        spread = self.spread(statistic) if np.isfinite(values).any() and self.prompts > 1 else None
        masks = among or [None] * count
        return [
            self._figure(float(value), None if spread is None else spread[:, i], masks[i], why)
            for i, value in enumerate(values)
        ]

    def value(self, statistic: Statistic) -> Floats:
        """Return the statistic of the data themselves, [K]."""
        found: Floats = _evaluate(statistic, np.ones((1, len(self.prompt_of))))[0]
        return found

    def spread(self, statistic: Statistic) -> Floats:
        """Return the statistic of every resample, [resamples, K]; nan if undefined."""
        rows = max(1, MAX_WEIGHTS // max(len(self.prompt_of), 1))
        parts = [
            _evaluate(statistic, self._counts[first : first + rows][:, self.prompt_of])
            for first in range(0, self.resamples, rows)
        ]
        return np.concatenate(parts)

    def _figure(self, value: float, spread: Floats | None, among: Mask | None, why: str) -> Figure:
        n = len(np.unique(self.prompt_of if among is None else self.prompt_of[among]))
        if not np.isfinite(value):
            return Figure.missing(why, n)
        if n < 2 or spread is None:
            return Figure(value, n=n, why="no interval: it rests on one prompt")
        defined = spread[np.isfinite(spread)]
        if len(defined) < MIN_DEFINED * self.resamples:
            return Figure(value, n=n, why=f"no interval: {n} prompts are too few, many resamples have no such figure")
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Figure(value, float(low), float(high), n)


def _evaluate(statistic: Statistic, weights: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(statistic(weights), dtype=np.float64)
