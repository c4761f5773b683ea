"""Figures of samples: does the goal steer, does it reach beyond the data, does it win by length?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rap_lightning.evaluation import statistics
from rap_lightning.evaluation.estimates import Bootstrap, Figure, Floats

Goal = float | None
"""What was asked for; None: no goal in the prompt."""

EQUAL = 1e-9
"""Scores that differ by less are equal."""

NO_SAMPLES = "no sample with a score at this goal"


@dataclass(frozen=True)
class Samples:
    """M judged responses.

    Attributes:
        prompts: of each, its prompt: any value that tells prompts apart.
        goals: of each, what was asked for.
        scores: the judge's.
        tokens: response tokens, end of turn included.
    """

    prompts: Sequence[Hashable]
    goals: Sequence[Goal]
    scores: Sequence[float]
    tokens: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.goals) == len(self.scores) == len(self.tokens):
            raise ValueError("Samples: prompts, goals, scores and tokens must be equally many")

    def _columns(self, goals: Sequence[Goal]) -> tuple[NDArray[np.int64], Floats, Floats]:
        number = {goal: i for i, goal in enumerate(goals)}
        if foreign := set(self.goals) - set(number):
            raise ValueError(f"Samples: goals {sorted(map(str, foreign))} are none of {list(goals)}")
        return (
            np.asarray([number[goal] for goal in self.goals], dtype=np.int64),
            np.asarray(self.scores, dtype=np.float64),
            np.asarray(self.tokens, dtype=np.float64),
        )


def controllability(samples: Samples, goals: Sequence[Goal], seed: int = 0) -> dict[str, Any]:
    """Does asking for more give more?

    - ``mean``: the mean score at each goal;
    - ``spearman``: rank correlation of the goals with these means: 1 where every higher goal scores higher;
    - ``spearman_samples``: the same of the goals with single scores; spread within a goal lowers it;
    - ``slope``: points of score per point of goal, least squares over the samples: 1 where goals are met exactly;
    - ``argmax``: the goal with the highest mean, and for each goal the share of the resamples in which it is.

    Goals of None have a mean; the others look at goals with a number.

    Args:
        samples: judged.
        goals: in the order of the lists that are returned.
        seed: of the bootstrap.
    """
    goal, scores, _ = samples._columns(goals)
    bootstrap = Bootstrap(samples.prompts, seed=seed)
    means = bootstrap.figures(
        lambda w: statistics.means_by_goal(scores, w, goal, len(goals)), len(goals), NO_SAMPLES,
        [goal == i for i in range(len(goals))],
    )  # fmt: skip
    result: dict[str, Any] = {"mean": [figure.as_dict() for figure in means]}
    stated = [i for i, asked in enumerate(goals) if asked is not None]
    if len(stated) < 2:
        why = Figure.missing("it takes at least two goals", bootstrap.prompts).as_dict()
        return result | {"spearman": why, "spearman_samples": why, "slope": why, "argmax": None}
    asked = np.asarray([goals[i] for i in stated], dtype=np.float64)
    among = np.isin(goal, stated)
    x = np.asarray([goals[i] if goals[i] is not None else 0.0 for i in goal], dtype=np.float64)

    def curve(weights: Floats) -> Floats:
        return statistics.means_by_goal(scores, weights, goal, len(goals))[:, stated]

    flat = "the same at every goal, or a goal without scores"
    result["spearman"] = bootstrap.figure(
        lambda w: statistics.curve_spearman(asked, curve(w)), f"mean scores are {flat}", among
    ).as_dict()
    result["spearman_samples"] = bootstrap.figure(
        lambda w: statistics.spearman(x, scores, w * among), f"scores are {flat}", among
    ).as_dict()
    result["slope"] = bootstrap.figure(
        lambda w: statistics.slope(x, scores, w * among), "goals without scores", among
    ).as_dict()
    result["argmax"] = _argmax(curve, bootstrap, goals, stated)
    return result


def _argmax(curve: Any, bootstrap: Bootstrap, goals: Sequence[Goal], stated: list[int]) -> dict[str, Any] | None:
    means = Bootstrap._of(curve, np.ones((1, len(bootstrap.prompt_of))))[0] if bootstrap.prompts else np.array([])
    if not len(means) or not np.isfinite(means).all():
        return None
    shares = statistics.highest_shares(bootstrap.spread(curve))
    by_goal: list[float | None] = [None] * len(goals)
    for place, share in zip(stated, shares, strict=True):
        by_goal[place] = float(share) if np.isfinite(share) else None
    return {"goal": goals[stated[int(np.argmax(means))]], "shares": by_goal}


def extrapolation(
    samples: Samples,
    goals: Sequence[Goal],
    best_seen: Mapping[Any, float],
    best_known: Mapping[Any, float],
    p99: float,
    highest: float,
    seed: int = 0,
) -> dict[str, Any]:
    """How often do samples reach what training never showed, or hardly ever?

    - ``best_seen``: share of samples that score at least as high as the best response to their prompt in training;
    - ``best_known``: the same against the best response to it in the data that are evaluated on, training or not;
    - ``p99``: share above the 99th percentile of all training rewards.

    Args:
        samples: judged by the judge of the data.
        goals: in the order of the lists that are returned.
        best_seen: prompt to the highest reward of its responses in training; prompts that are not there don't count.
        best_known: the same of the evaluated data.
        p99: the percentile.
        highest: the highest score that the judge can give.
        seed: of the bootstrap.
    """
    goal, scores, _ = samples._columns(goals)
    bootstrap, at = Bootstrap(samples.prompts, seed=seed), [goal == i for i in range(len(goals))]

    def shares(hits: Floats, among: NDArray[np.bool_], why: str) -> list[dict[str, Any]]:
        found = bootstrap.figures(
            lambda w: statistics.means_by_goal(hits, w * among, goal, len(goals)), len(goals), why,
            [among & here for here in at],
        )  # fmt: skip
        return [figure.as_dict() for figure in found]

    result: dict[str, Any] = {}
    for name, best, where in (("best_seen", best_seen, "in training"), ("best_known", best_known, "in the data")):
        bar = np.asarray([best.get(prompt, np.nan) for prompt in samples.prompts], dtype=np.float64)
        known = np.isfinite(bar)
        reached = known & (scores >= np.where(known, bar, np.inf) - EQUAL)
        result[name] = shares(reached.astype(np.float64), known, f"none of the prompts has a scored response {where}")
    if p99 >= highest - EQUAL:
        why = "the 99th percentile is the highest score there is: nothing lies above"
        share = [Figure.missing(why).as_dict()] * len(goals)
    else:
        above = (scores > p99 + EQUAL).astype(np.float64)
        share = shares(above, np.ones(len(scores), dtype=bool), NO_SAMPLES)
    return result | {"p99": {"score": p99, "share": share}}


LENGTH_METHOD = (
    "least squares of score on one effect per goal and a common slope of log(tokens), predicted for each goal at the "
    "mean log(tokens) of all samples"
)


def length(samples: Samples, goals: Sequence[Goal], seed: int = 0) -> dict[str, Any]:
    """Does a goal win by length?

    - ``tokens``: mean length at each goal;
    - ``controlled``: the mean score at each goal as it would be at one length; ``method`` says how;
    - ``slope``: points of score per doubling of the length, within a goal.
    """
    goal, scores, tokens = samples._columns(goals)
    bootstrap, masks = Bootstrap(samples.prompts, seed=seed), [goal == i for i in range(len(goals))]
    lengths = np.maximum(tokens, 1.0)
    same = "the lengths don't vary within a goal, or a goal has no scores"
    mean_tokens = bootstrap.figures(
        lambda w: statistics.means_by_goal(tokens, w, goal, len(goals)), len(goals), NO_SAMPLES, masks
    )
    controlled = bootstrap.figures(
        lambda w: statistics.length_controlled(scores, lengths, w, goal, len(goals))[0], len(goals), same, masks
    )
    slope = bootstrap.figure(
        lambda w: statistics.length_controlled(scores, lengths, w, goal, len(goals))[1] * np.log(2), same
    )
    return {
        "tokens": [figure.as_dict() for figure in mean_tokens],
        "controlled": [figure.as_dict() for figure in controlled],
        "slope": slope.as_dict(),
        "method": LENGTH_METHOD,
    }
