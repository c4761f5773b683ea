"""evaluation.json, as ``rap-lightning evaluate`` writes it, and the paired difference of two evaluations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rap_lightning.evaluation import Bootstrap, Figure, statistics
from rap_lightning.reporting.text import as_number, clean

VERSION = 1


class SampledText(NamedTuple):
    """A response that was sampled at a goal."""

    prompt: str
    goal: float | None
    response: str
    score: float | None
    tokens: int | None
    greedy: bool = False


Scores = dict[float | None, dict[str, float]]
"""goal -> prompt id -> mean score of its samples; the goal is None for prompts without one."""


@dataclass
class Evaluation:
    """An evaluation.json.

    Attributes:
        document: its content; empty where it can't be used, and then ``notes`` says why.
        scores: of the samples.jsonl next to it, to compare runs prompt by prompt.
        notes: what is missing from it.
    """

    document: dict[str, Any] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def goals(self) -> list[float]:
        """The goals in the prompts, low to high; figures by goal are parallel to it."""
        given = self.document.get("goals")
        goals = [as_number(goal) for goal in given] if isinstance(given, list) else []
        return [goal for goal in goals if goal is not None]

    @property
    def scale(self) -> tuple[float, float] | None:
        """Lowest and highest reward."""
        low, high = as_number(self.get("scale", "low")), as_number(self.get("scale", "high"))
        return (low, high) if low is not None and high is not None and low < high else None

    @property
    def guidance(self) -> str:
        """How sampling was guided, in words; empty where it wasn't."""
        weight, floor = as_number(self.get("guidance", "weight")), as_number(self.get("guidance", "plausibility"))
        words = [f"guidance {weight:g} against {self.get('guidance', 'against')}"] if weight else []
        return ", ".join([*words, f"floor {floor:g}"] if floor else words)

    def get(self, *path: str) -> Any:
        """Return the value at a path of keys; None where there is none."""
        found: Any = self.document
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def figure(self, *path: str) -> Figure:
        """Return the number at a path, with its interval."""
        return _figure(self.get(*path), self.get(*path[:-1], "why"))

    def figures(self, *path: str, count: int | None = None) -> list[Figure]:
        """Return the list of numbers at a path; empty unless there is one for each goal (or ``count`` of them)."""
        given = self.get(*path)
        fits = isinstance(given, list) and len(given) == (len(self.goals) if count is None else count)
        return [_figure(one) for one in given] if fits else []

    def at_best_goal(self) -> tuple[float | None, Figure]:
        """Return the highest goal and the mean score there; the goal is None if no prompt had one."""
        means = self.figures("controllability", "sampled", "mean")
        if means:
            best = self.goals.index(max(self.goals))
            return self.goals[best], means[best]
        return None, self.figure("without_goal", "controllability", "sampled", "mean")

    def samples(self) -> list[SampledText]:
        """Return the samples that the file shows: sampled ones, or else greedy ones."""
        given = self.document.get("samples")
        found = [sampled(one) for one in given if isinstance(one, dict)] if isinstance(given, list) else []
        return [one for one in found if not one.greedy] or found


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.json; a file that can't be used gives an empty Evaluation with a note."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return Evaluation(notes=["evaluation.json is not valid JSON (cut off?); it is left out"])
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        return Evaluation(
            notes=[f"evaluation.json has version {version!r}, expected {VERSION}; it is left out. Evaluate again"]
        )
    result = Evaluation(found)
    left_out = result.get("left_out")
    for name, why in left_out.items() if isinstance(left_out, dict) else ():
        result.notes.append(f"{clean(name, 60)} was not measured: {clean(why, 300)}")
    if isinstance(note := result.get("note"), str):
        result.notes.append(clean(note))
    if without := as_number(result.get("trouble", "without_score")):
        result.notes.append(f"{without:,.0f} sampled responses have no score")
    return result


def sampled(line: dict[str, Any]) -> SampledText:
    """Return a sample from its JSON object."""
    tokens = as_number(line.get("tokens"))
    return SampledText(
        str(line.get("prompt", "")), as_number(line.get("goal")), str(line.get("response", "")),
        as_number(line.get("score")), None if tokens is None else int(tokens), line.get("greedy") is True,
    )  # fmt: skip


def mean_scores(lines: list[dict[str, Any]]) -> Scores:
    """Return mean scores by goal and prompt id from the lines of evaluate's samples.jsonl, greedy ones left out."""
    found: dict[float | None, dict[str, list[float]]] = {}
    for line in lines:
        score = as_number(line.get("score"))
        if score is not None and line.get("greedy") is not True:
            found.setdefault(as_number(line.get("goal")), {}).setdefault(line["prompt_id"], []).append(score)
    return {
        goal: {prompt: sum(scores) / len(scores) for prompt, scores in by_prompt.items()}
        for goal, by_prompt in found.items()
    }


def difference(one: dict[str, float], other: dict[str, float]) -> Figure:
    """Return the mean score of ``one`` minus that of ``other`` over their common prompts, with its 95% interval.

    The difference is paired by prompt: the intervals of two means may overlap where their difference is clear.
    """
    prompts = sorted(one.keys() & other.keys())
    if len(prompts) < 2:
        return Figure.missing("fewer than two prompts in common")
    differences = np.array([one[prompt] - other[prompt] for prompt in prompts])
    return Bootstrap(prompts).figure(lambda weights: statistics.mean(differences, weights), "no prompts")


def _figure(given: Any, why: Any = None) -> Figure:
    if not isinstance(given, dict):
        return Figure(as_number(given), why=why if isinstance(why, str) else None)
    value, low, high = (as_number(given.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        low = high = None
    reason = given.get("why", why)
    return Figure(value, low, high, int(as_number(given.get("n")) or 0), reason if isinstance(reason, str) else None)
