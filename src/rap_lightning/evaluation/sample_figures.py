"""Figures of judged samples: does the goal steer, does it reach beyond the data, does it win by length?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rap_lightning.evaluation import statistics
from rap_lightning.evaluation.bootstrap import Bootstrap, Figure, Floats, Mask, Statistic

Goal = float | None
"""The requested goal; None without a goal in the prompt."""

EQUAL = 1e-9
"""Scores that differ by less are equal."""

NO_SAMPLES = "no sample with a score at this goal"
LENGTH_METHOD = (
    "least squares of score on one effect per goal and a common slope of log(tokens), predicted for each goal at the "
    "mean log(tokens) of all samples"
)


@dataclass(frozen=True)
class Samples:
    """M judged responses: identity of the prompt, requested goal, score, and tokens with the end of turn."""

    prompts: Sequence[Hashable]
    goals: Sequence[Goal]
    scores: Sequence[float]
    tokens: Sequence[int]


class _ByGoal:
    """Samples as arrays [M], with a bootstrap, for figures at each of G goals; ``goal`` is the number of the goal."""

    def __init__(self, samples: Samples, goals: Sequence[Goal], seed: int) -> None:
        number = {goal: i for i, goal in enumerate(goals)}
        self.goal: NDArray[np.int64] = np.asarray([number[goal] for goal in samples.goals], dtype=np.int64)
        self.scores: Floats = np.asarray(samples.scores, dtype=np.float64)
        self.tokens: Floats = np.asarray(samples.tokens, dtype=np.float64)
        self.count, self.bootstrap = len(goals), Bootstrap(samples.prompts, seed=seed)

    def figures(self, statistic: Statistic, why: str, among: Mask | None = None) -> list[dict[str, Any]]:
        """Return a statistic of [R, M] weights that has [R, G] values."""
        masks = [(self.goal == i) if among is None else among & (self.goal == i) for i in range(self.count)]
        return [figure.as_dict() for figure in self.bootstrap.figures(statistic, self.count, why, masks)]

    def means(self, values: Floats, why: str = NO_SAMPLES, among: Mask | None = None) -> list[dict[str, Any]]:
        """Return the mean of [M] values at each goal, over the samples of ``among``."""
        use = np.ones(len(values)) if among is None else among
        return self.figures(
            lambda w: statistics.means_by_goal(values, w * use, self.goal, self.count), why, among
        )  # fmt: skip


def controllability(samples: Samples, goals: Sequence[Goal], seed: int = 0) -> dict[str, Any]:
    """Return how scores follow the goals.

    - ``mean``: mean score at each goal;
    - ``spearman``: rank correlation of the goals with these means: 1 if every higher goal scores higher;
    - ``spearman_samples``: rank correlation of the goals with single scores; spread within a goal lowers it;
    - ``slope``: points of score per point of goal, least squares over the samples: 1 if goals are met exactly;
    - ``argmax``: the goal with the highest mean, and for each goal the share of resamples in which it is the highest.

    Goals of None have a mean; the other figures use goals with a number. Lists are in the order of ``goals``.
    """
    by_goal = _ByGoal(samples, goals, seed)
    scores, goal, bootstrap = by_goal.scores, by_goal.goal, by_goal.bootstrap
    result: dict[str, Any] = {"mean": by_goal.means(scores)}
    stated = [i for i, one in enumerate(goals) if one is not None]
    if len(stated) < 2:
        why = Figure.missing("it takes at least two goals", bootstrap.prompts).as_dict()
        return result | {"spearman": why, "spearman_samples": why, "slope": why, "argmax": None}
    numbers = np.asarray([goals[i] for i in stated], dtype=np.float64)
    among = np.isin(goal, stated)
    x = np.asarray([goals[i] if goals[i] is not None else 0.0 for i in goal], dtype=np.float64)

    def curve(weights: Floats) -> Floats:
        return statistics.means_by_goal(scores, weights, goal, len(goals))[:, stated]

    flat = "the same at every goal, or a goal without scores"
    figures: dict[str, tuple[Statistic, str]] = {
        "spearman": (lambda w: statistics.curve_spearman(numbers, curve(w)), f"mean scores are {flat}"),
        "spearman_samples": (lambda w: statistics.spearman(x, scores, w * among), f"scores are {flat}"),
        "slope": (lambda w: statistics.slope(x, scores, w * among), "goals without scores"),
    }
    result |= {name: bootstrap.figure(*figure, among).as_dict() for name, figure in figures.items()}
    return result | {"argmax": _argmax(curve, bootstrap, goals, stated)}


def _argmax(
    curve: Statistic, bootstrap: Bootstrap, goals: Sequence[Goal], stated: Sequence[int]
) -> dict[str, Any] | None:
    means = bootstrap.value(curve) if bootstrap.prompts else np.array([])
    if not len(means) or not np.isfinite(means).all():
        return None
    shares: list[float | None] = [None] * len(goals)
    for place, share in zip(stated, statistics.highest_shares(bootstrap.spread(curve)), strict=True):
        shares[place] = float(share) if np.isfinite(share) else None
    return {"goal": goals[stated[int(np.argmax(means))]], "shares": shares}


def extrapolation(
    samples: Samples,
    goals: Sequence[Goal],
    best_seen: Mapping[Any, float],
    best_known: Mapping[Any, float],
    p99: float,
    highest: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Return how often samples reach what training never or hardly ever showed.

    - ``best_seen``: share of samples that score at least as high as the best response to their prompt in training;
    - ``best_known``: the same against the best response in the evaluated data, training or not;
    - ``p99``: share above the 99th percentile of all training rewards.

    Args:
        samples: samples judged by the judge of the data.
        best_seen: highest reward of each prompt in training; samples of other prompts don't count.
        best_known: highest reward of each prompt in the evaluated data.
        p99: the percentile.
        highest: the highest score that the judge can give.
    """
    by_goal = _ByGoal(samples, goals, seed)
    result: dict[str, Any] = {}
    for name, best, where in (("best_seen", best_seen, "in training"), ("best_known", best_known, "in the data")):
        bar = np.asarray([best.get(prompt, np.nan) for prompt in samples.prompts], dtype=np.float64)
        known = np.isfinite(bar)
        reached = known & (by_goal.scores >= np.where(known, bar, np.inf) - EQUAL)
        why = f"none of the prompts has a scored response {where}"
        result[name] = by_goal.means(reached.astype(np.float64), why, known)
    if p99 >= highest - EQUAL:
        why = "the 99th percentile is the highest score there is: nothing lies above"
        share = [Figure.missing(why).as_dict()] * len(goals)
    else:
        share = by_goal.means((by_goal.scores > p99 + EQUAL).astype(np.float64))
    return result | {"p99": {"score": p99, "share": share}}


def length(samples: Samples, goals: Sequence[Goal], seed: int = 0) -> dict[str, Any]:
    """Return how much of a goal's score comes from length.

    - ``tokens``: mean length at each goal;
    - ``controlled``: mean score at each goal as it would be at one length; ``method`` says how;
    - ``slope``: points of score per doubling of the length, within a goal.
    """
    by_goal = _ByGoal(samples, goals, seed)
    lengths = np.maximum(by_goal.tokens, 1.0)
    why = "the lengths don't vary within a goal, or a goal has no scores"

    def controlled(weights: Floats) -> tuple[Floats, Floats]:
        return statistics.length_controlled(by_goal.scores, lengths, weights, by_goal.goal, len(goals))

    return {
        "tokens": by_goal.means(by_goal.tokens),
        "controlled": by_goal.figures(lambda w: controlled(w)[0], why),
        "slope": by_goal.bootstrap.figure(lambda w: controlled(w)[1] * np.log(2), why).as_dict(),
        "method": LENGTH_METHOD,
    }
