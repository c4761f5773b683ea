"""Statistics of weighted observations, for many weightings at once.

Shape legend: R weightings, M observations, G goals. Integer weights are repeated observations, exactly: a statistic
of weights is the statistic of the data with each observation repeated as often as its weight says.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rap_lightning.evaluation.bootstrap import Floats


def mean(values: Floats, weights: Floats) -> Floats:
    """Return [R] weighted means of [M] values; nan without weight."""
    found: Floats = (weights @ values) / weights.sum(1)
    return found


def means_by_goal(values: Floats, weights: Floats, goal: NDArray[np.int64], goals: int) -> Floats:
    """Return [R, G] weighted means of [M] values at each goal, numbered by ``goal`` [M]; nan for one without weight."""
    member = goal[:, None] == np.arange(goals)
    found: Floats = (weights @ (member * values[:, None])) / (weights @ member.astype(np.float64))
    return found


def mid_ranks(values: Floats, weights: Floats) -> Floats:
    """Return [R, M] ranks among the weighted observations; equal values get the mean of their ranks.

    Ranks are the weight of lower values plus half the weight of equal ones: up to a constant, which cancels in
    correlations.
    """
    distinct, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(distinct)))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Floats = (np.cumsum(mass, axis=1) - mass / 2)[:, place]
    return ranks


def pearson(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return [R] weighted correlations of x and y, each [M] or [R, M]; nan if one of them is constant."""
    total = weights.sum(1, keepdims=True)
    x = x - (weights * x).sum(1, keepdims=True) / total
    y = y - (weights * y).sum(1, keepdims=True) / total
    both, of_x, of_y = ((weights * product).sum(1) for product in (x * y, x * x, y * y))
    size = np.sqrt(of_x * of_y)
    tiny = 1e-12 * np.maximum(total[:, 0], 1)  # a constant varies by rounding
    found: Floats = np.where(size > tiny, both / np.where(size > tiny, size, 1), np.nan)
    return np.clip(found, -1, 1)


def spearman(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return [R] weighted rank correlations of [M] values, ties at their mean rank (Spearman 1904)."""
    return pearson(mid_ranks(x, weights), mid_ranks(y, weights), weights)


def curve_spearman(goals: Floats, means: Floats) -> Floats:
    """Return [R] rank correlations of goals [G] and mean scores [R, G]; nan if a mean is nan or all are equal."""
    flat = np.ones_like(means)
    below = (means[:, :, None] > means[:, None, :]).sum(2) + (means[:, :, None] == means[:, None, :]).sum(2) / 2
    found = pearson(mid_ranks(goals, flat), below, flat)
    return np.where(np.isfinite(means).all(1), found, np.nan)


def slope(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return [R] slopes of the least-squares line of y on x, [M] each; nan if x is constant."""
    total = weights.sum(1, keepdims=True)
    off = x - (weights @ x)[:, None] / total
    across = (weights * off * off).sum(1)
    varies = across > 1e-20 * total[:, 0] * (1 + np.abs(x).max(initial=0)) ** 2  # a constant varies by rounding
    found: Floats = np.where(varies, (weights * off * y).sum(1) / np.where(varies, across, 1), np.nan)
    return found


def highest_shares(means: Floats) -> Floats:
    """Return the fraction of rows [R, G] in which each goal is the highest, [G]; ties share, nan rows don't count."""
    rows = means[np.isfinite(means).all(1)]
    if not len(rows):
        return np.full(means.shape[1], np.nan)
    top = rows == rows.max(1, keepdims=True)
    found: Floats = (top / top.sum(1, keepdims=True)).mean(0)
    return found


def length_controlled(
    scores: Floats, lengths: Floats, weights: Floats, goal: NDArray[np.int64], goals: int
) -> tuple[Floats, Floats]:
    """Return the mean score at each goal as it would be at one length, [R, G], and the slope used, [R].

    Least squares of score on one effect per goal and on log(length) with a common slope (analysis of covariance);
    predicted for each goal at the mean log length of all observations. If lengths are constant within goals, the slope
    is undefined: nan. Lengths are tokens, at least 1; ``goal`` is the number of the goal.
    """
    logs = np.log(lengths)
    by_goal = [means_by_goal(values, weights, goal, goals) for values in (scores, logs)]
    score_off, log_off = (values - np.nan_to_num(m)[:, goal] for values, m in zip((scores, logs), by_goal, strict=True))
    within = (weights * log_off * log_off).sum(1)
    varies = within > 1e-9 * weights.sum(1)
    per_log = np.where(varies, (weights * log_off * score_off).sum(1) / np.where(varies, within, 1), np.nan)
    common = mean(logs, weights)[:, None]
    return by_goal[0] - per_log[:, None] * (by_goal[1] - common), per_log
