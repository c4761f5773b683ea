"""The difference of two runs on the same prompts: intervals of each alone may overlap where it is clear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from rap_lightning.evaluation import Bootstrap, statistics
from rap_lightning.reporting.curves import as_number
from rap_lightning.reporting.evaluation import Estimate


class Scored(NamedTuple):
    """What counts of a sample: its goal (None where none was asked for), its prompt, its score.

    The score is None where nobody gave one, and of greedy responses, which are not compared.
    """

    goal: float | None
    prompt: str
    score: float | None


Scores = dict[float | None, dict[str, float]]
"""goal -> prompt -> mean score of its samples; None as the goal where none was asked for"""


def scored_of(line: dict[str, Any]) -> Scored | None:
    """A line of evaluate's samples.jsonl; None where it is no such line."""
    if not isinstance(line.get("prompt_id"), str):
        return None
    greedy = line.get("greedy") is True
    return Scored(as_number(line.get("goal")), line["prompt_id"], None if greedy else as_number(line.get("score")))


def mean_scores(samples: Iterable[Scored]) -> Scores:
    """By goal and prompt, of those that count."""
    found: dict[float | None, dict[str, list[float]]] = {}
    for one in samples:
        if one.score is not None:
            found.setdefault(one.goal, {}).setdefault(one.prompt, []).append(one.score)
    return {
        goal: {prompt: sum(scores) / len(scores) for prompt, scores in by_prompt.items()}
        for goal, by_prompt in found.items()
    }


def difference(one: dict[str, float], other: dict[str, float]) -> Estimate | None:
    """Mean score of one less that of the other over the prompts of both, with its 95% bootstrap interval.

    None where they have fewer than two prompts in common.
    """
    prompts = sorted(one.keys() & other.keys())
    if len(prompts) < 2:
        return None
    apart = np.array([one[prompt] - other[prompt] for prompt in prompts])
    found = Bootstrap(prompts).figure(lambda weights: statistics.mean(apart, weights), "no prompts")
    return Estimate(found.value, found.low, found.high, found.n)
