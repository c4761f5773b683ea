"""The difference of two runs on the same prompts: intervals of each alone may overlap where it is clear."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rap_lightning.evaluation import Bootstrap
from rap_lightning.reporting.curves import as_number
from rap_lightning.reporting.evaluation import Estimate

Scores = dict[float | None, dict[str, float]]
"""goal -> prompt -> mean score of its samples; None as the goal where none was asked for"""


def read_scores(path: Path) -> Scores:
    """The sampled (not greedy) scores in evaluate's samples.jsonl; lines that can't be read are passed over."""
    sums: dict[tuple[float | None, str], list[float]] = {}
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(row, dict) or row.get("greedy") is True or not isinstance(row.get("prompt_id"), str):
                continue
            if (score := as_number(row.get("score"))) is not None:
                sums.setdefault((as_number(row.get("goal")), row["prompt_id"]), []).append(score)
    scores: Scores = {}
    for (goal, prompt), found in sums.items():
        scores.setdefault(goal, {})[prompt] = sum(found) / len(found)
    return scores


def difference(one: dict[str, float], other: dict[str, float]) -> Estimate | None:
    """Mean score of one less that of the other over the prompts of both, with its 95% bootstrap interval.

    None where they have fewer than two prompts in common.
    """
    prompts = sorted(one.keys() & other.keys())
    if len(prompts) < 2:
        return None
    apart = np.array([one[prompt] - other[prompt] for prompt in prompts])
    found = Bootstrap(prompts).figure(lambda weights: weights @ apart / weights.sum(axis=1), "no prompts")
    return Estimate(found.value, found.low, found.high, found.n)
