"""Figures of response log-probabilities: what was unlearned, and whether the policy tells good from bad."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rap_lightning.evaluation import statistics
from rap_lightning.evaluation.bootstrap import Bootstrap, Floats, Mask

ROLES = ("chosen", "rejected")


@dataclass(frozen=True)
class Responses:
    """M responses of the data: those of pair i are 2i (chosen, the higher reward) and 2i + 1 (rejected).

    ``prompts`` identifies the prompt of each; ``tokens`` counts the end of turn.
    """

    prompts: Sequence[Hashable]
    rewards: Sequence[float]
    tokens: Sequence[int]

    @property
    def chosen(self) -> Mask:
        """[M]: True for the chosen responses."""
        found: Mask = np.arange(len(self.prompts)) % 2 == 0
        return found


def bins_of(low: float, high: float, count: int) -> list[tuple[float, float]]:
    """Return bins of equal width from ``low`` to ``high``; the last one includes its upper end."""
    edges = np.linspace(low, high, count + 1)
    return [(float(a), float(b)) for a, b in pairwise(edges)]


def bin_numbers(rewards: Sequence[float], bins: Sequence[tuple[float, float]]) -> NDArray[np.int64]:
    """Return the bin of each reward, [M]; rewards outside belong to the nearest bin."""
    edges = np.asarray([low for low, _ in bins[1:]])
    numbers: NDArray[np.int64] = np.searchsorted(edges, np.asarray(rewards), side="right")
    return numbers


def unlearning(
    responses: Responses, changes: Mapping[str, Sequence[float]], bins: Sequence[tuple[float, float]], seed: int = 0
) -> dict[str, Any]:
    """Return the mean change of a response's log-probability against the base, by reward bin and role.

    Args:
        changes: for each condition, policy minus base log-probability of each response [M], in nats.
        bins: reward bins, [low, high).

    Returns:
        ``conditions``: for each condition and role a figure per bin, in nats per response; ``per_token``: the same
        after each change was divided by the response's tokens.
    """
    number, chosen = bin_numbers(responses.rewards, bins), responses.chosen
    tokens = np.asarray(responses.tokens, dtype=np.float64)
    bootstrap = Bootstrap(responses.prompts, seed=seed)

    def table(divisor: Floats) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for condition, change in changes.items():
            values = np.asarray(change, dtype=np.float64) / divisor
            found[condition] = {}
            for role in ROLES:
                mine = chosen if role == "chosen" else ~chosen
                figures = bootstrap.figures(
                    lambda w, v=values, m=mine: statistics.means_by_goal(v, w * m, number, len(bins)),  # type: ignore[misc]
                    len(bins),
                    f"no {role} response with such a reward",
                    [mine & (number == i) for i in range(len(bins))],
                )
                found[condition][role] = [figure.as_dict() for figure in figures]
        return found

    return {
        "unit": "nats",
        "bins": [list(one) for one in bins],
        "conditions": table(np.ones_like(tokens)),
        "per_token": table(np.maximum(tokens, 1)),
    }


def read_off(logps: Floats, goals: Floats) -> Floats:
    """Return the goal under which each response is most likely, [M], from [M, G] and [G]; ties give their mean."""
    top = logps == logps.max(1, keepdims=True)
    found: Floats = (top * goals).sum(1) / top.sum(1)
    return found


DISCRIMINATION_METHOD = (
    "a response's score is read off as the goal under which its log-probability is highest (taking a response's mean "
    "over goals away changes nothing); centred: after each goal's mean over all responses was taken away"
)


def discrimination(responses: Responses, logps: Floats, goals: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return how well the goal under which the policy would most likely write a response predicts its reward.

    - ``spearman``: rank correlation of the predicted score with the judge's;
    - ``pair_accuracy``: how often the better response of a pair has the higher predicted score; ties count half, and
      pairs with equal rewards are left out;
    - ``centred``: both again, after subtracting from each goal's log-probabilities their mean over responses. A goal
      that makes every text more likely then no longer wins everywhere.

    ``logps`` are those of each response under each goal, [M, G], in nats.
    """
    bootstrap = Bootstrap(responses.prompts, seed=seed)
    asked = np.asarray(goals, dtype=np.float64)
    centred = logps - logps.mean(0, keepdims=True) if len(logps) else logps
    return {
        **_discrimination(responses, read_off(logps, asked), bootstrap),
        "centred": _discrimination(responses, read_off(centred, asked), bootstrap),
        "method": DISCRIMINATION_METHOD,
        "goals": [float(goal) for goal in goals],
    }


def _discrimination(responses: Responses, read: Floats, bootstrap: Bootstrap) -> dict[str, Any]:
    rewards = np.asarray(responses.rewards, dtype=np.float64)
    differ = np.repeat(rewards[0::2] != rewards[1::2], 2)
    right = np.sign(read[0::2] - read[1::2]) * np.sign(rewards[0::2] - rewards[1::2])
    hits = np.repeat((right + 1) / 2, 2)
    first = differ & responses.chosen  # a pair counts once
    return {
        "spearman": bootstrap.figure(
            lambda w: statistics.spearman(read, rewards, w), "every response is read as the same, or judged as the same"
        ).as_dict(),
        "pair_accuracy": bootstrap.figure(
            lambda w: statistics.mean(hits, w * first), "the judge finds every pair equal", first
        ).as_dict(),
    }
