"""The parts of an evaluation that judged samples give: controllability, extrapolation, length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rap_lightning import evaluation
from rap_lightning.errors import DataError
from rap_lightning.onpolicy.evaluate import evaluation_data as data
from rap_lightning.onpolicy.evaluate.evaluation_plan import Plan
from rap_lightning.onpolicy.evaluate.sampled import Sampled

SHOWN_PROMPTS = 8  # whose samples stand in the document; samples.jsonl has all


def sample_parts(plan: Plan, sampled: Sampled, evaluated: data.Evaluated, seen: data.Seen | None) -> dict[str, Any]:
    """The document's parts; ``seen`` is what training showed, None where extrapolation isn't asked for."""
    document: dict[str, Any] = {}
    drawn, picked = sampled.part(greedy=False), sampled.part(greedy=True)
    if not drawn.scores:
        raise DataError(
            "no sample has a score: "
            + ("; ".join(f"{n:,} {what}" for what, n in sampled.counts.items()) or "none drawn")
        )
    if sampled.missing or sampled.counts:
        document["trouble"] = {"without_score": sampled.missing, "counts": dict(sampled.counts)}
    if note := _foreign(drawn.scores, evaluated):
        print(f"note: {note}")
        document["note"] = note
    if "controllability" in plan.parts:
        document["controllability"] = {"sampled": evaluation.controllability(drawn, plan.goals, plan.seed)}
        if plan.greedy:
            document["controllability"]["greedy"] = evaluation.controllability(picked, plan.goals, plan.seed)
    if seen is not None:
        highest = plan.judge.scale[1] if plan.judge is not None and plan.judge.scale else np.inf
        highest = min(highest, plan.rules.goal.scale.judge_range[1])
        known = data.best_rewards(evaluated.pairs)
        part = evaluation.extrapolation(drawn, plan.goals, seen.best, known, seen.p99, float(highest), plan.seed)
        of_prompts = sum(one in seen.best for one in evaluated.prompt_ids)
        document["extrapolation"] = part | {
            "training": {"split": seen.split, "responses": seen.responses, "prompts_seen": of_prompts}
        }
    if "length" in plan.parts:
        document["length"] = evaluation.length(drawn, plan.goals, plan.seed)
    return document


BY_GOAL = {
    "controllability": (("sampled", "mean"), ("greedy", "mean")),
    "extrapolation": (("best_seen",), ("best_known",), ("p99", "share")),
    "length": (("tokens",), ("controlled",)),
}
"""Where in the document lists parallel to ``goals`` stand."""


def set_goalless_apart(document: dict[str, Any]) -> None:
    """Move the figures without a goal out of the lists by goal, into ``without_goal``; goals are numbers then."""
    if None not in document["goals"]:
        return
    place = document["goals"].index(None)
    document["goals"] = [goal for goal in document["goals"] if goal is not None]
    apart: dict[str, Any] = {}
    for part, lists in BY_GOAL.items():
        for path in lists if part in document else ():
            holder, target = document[part], apart.setdefault(part, {})
            for key in path[:-1]:
                holder, target = holder.get(key), target.setdefault(key, {})
            if holder is not None:
                target[path[-1]] = holder[path[-1]].pop(place)
    for decoding in document.get("controllability", {}).values():
        if decoding["argmax"] is not None:
            decoding["argmax"]["shares"].pop(place)
    document["without_goal"] = apart


def _foreign(scores: Sequence[float], evaluated: data.Evaluated) -> str | None:
    low, high = evaluated.rewards
    width = (high - low) or 1.0
    outside = np.mean([not low - width <= score <= high + width for score in scores])
    if outside < 0.1:
        return None
    return (
        f"the judge's scores go from {min(scores):g} to {max(scores):g}, the data's rewards from {low:g} to {high:g}. "
        "Is it the judge of the data? Otherwise extrapolation and slope compare different units."
    )


def shown(sampled: Sampled, prompt_ids: Sequence[str]) -> list[dict[str, Any]]:
    """The samples that stand in the document: the first of some prompts at each goal."""
    first = set(prompt_ids[:SHOWN_PROMPTS])
    keys = ("prompt", "goal", "response", "score", "tokens", "greedy")
    return [{key: row[key] for key in keys} for row in sampled.rows if row["prompt_id"] in first and row["sample"] == 0]
