"""Paired differences with their intervals, and areas under reward-KL frontiers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95% points of Student's t, by degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """One arm minus another, paired by seed and prompt.

    Attributes:
        mean: over seeds.
        low, high: 95%, bootstrap of seeds and of prompts within them.
        t_low, t_high: 95%, Student's t over seeds; None of a single seed.
        ahead: seeds in which the first is ahead.
        seeds: how many there are.
    """

    mean: float
    low: float
    high: float
    t_low: float | None
    t_high: float | None
    ahead: int
    seeds: int

    def above(self, bound: float) -> str:
        """``holds`` where both intervals are above a bound, ``fails`` where both are below, else ``open``."""
        if self.t_low is None or self.t_high is None:
            return "open"
        if min(self.low, self.t_low) > bound:
            return "holds"
        return "fails" if max(self.high, self.t_high) < bound else "open"


def difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Difference:
    """Of the values by prompt of two arms, a pair of lists for each seed."""
    gaps = [np.asarray(one) - np.asarray(other) for one, other in pairs]
    means = [float(gap.mean()) for gap in gaps]
    rng = np.random.default_rng(seed)
    within = np.stack([gap[rng.integers(0, len(gap), (RESAMPLES, len(gap)))].mean(1) for gap in gaps])  # [seeds, R]
    drawn = rng.integers(0, len(gaps), (RESAMPLES, len(gaps)))
    resampled = np.stack([within[drawn[:, i], np.arange(RESAMPLES)] for i in range(len(gaps))]).mean(0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = statistics.fmean(means)
    t_low = t_high = None
    if len(means) > 1:
        half = STUDENT[len(means) - 1] * statistics.stdev(means) / len(means) ** 0.5
        t_low, t_high = mean - half, mean + half
    return Difference(mean, float(low), float(high), t_low, t_high, sum(m > 0 for m in means), len(means))


def hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull of (KL, score) points, from the lowest KL to the highest score.

    >>> hull([(0, 1), (1, 3), (2, 2), (2, 4), (3, 3)])
    [(0, 1), (1, 3), (2, 4)]
    """
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while len(found) > 1 and _cross(found[-2], found[-1], (x, y)) >= 0:
            found.pop()
        found.append((x, y))
    best = max(range(len(found)), key=lambda i: found[i][1])
    return found[: best + 1]


def area(points: Sequence[tuple[float, float]], until: float) -> float:
    """The mean score under the hull from KL 0 to ``until``; beyond its end it keeps its best score.

    >>> area([(0, 1), (2, 3)], 2), area([(0, 1), (2, 3)], 4)
    (2.0, 2.5)
    """
    corners = hull(points)
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    grid = np.linspace(0, until, 2001)
    return round(float(np.trapezoid(np.interp(grid, xs, ys), grid) / until), 6)


def _cross(one: tuple[float, float], two: tuple[float, float], three: tuple[float, float]) -> float:
    return (two[0] - one[0]) * (three[1] - one[1]) - (two[1] - one[1]) * (three[0] - one[0])
