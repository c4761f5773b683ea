"""evaluation.json, as ``rap-lightning evaluate`` writes it; what doesn't fit is left out, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rap_lightning.reporting.curves import as_number

VERSION = 1
ABOUT = (
    "model", "base", "judge", "temperature", "top_p", "max_new_tokens", "guidance", "prompts", "split",
    "samples_per_prompt", "seed", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval and the number of prompts behind it; no value, and why, where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Sample:
    """A response that was sampled at a goal."""

    prompt: str
    goal: float | None
    response: str
    score: float | None
    tokens: int | None
    greedy: bool = False


@dataclass(frozen=True)
class Steering:
    """How scores follow goals: a mean per goal, the mean where none was asked for, and what sums the curve up."""

    mean: list[Estimate]
    unasked: Estimate | None
    spearman: Estimate
    slope: Estimate
    best_goal: float | None
    best_goal_share: float | None


@dataclass
class Evaluation:
    """The parts that the file has; the others are None or empty.

    Attributes:
        about: model, base, judge, how was sampled, prompts, seed, seconds.
        scale: lowest and highest reward.
        goals: numbers that were asked for, low to high; figures by goal are parallel to it.
        sampled, greedy: controllability.
        bins, unlearning: reward bins; (condition, role) -> change in nats per bin.
        best_seen, best_known, p99, p99_score: extrapolation: shares per goal (of the best response in training, of the
            best in the evaluated data, above the 99th percentile), and the score that is that percentile.
        discrimination: spearman and pair_accuracy.
        tokens, controlled: length per goal, and the score with length held constant.
        faults: what was left out, and why.
    """

    about: dict[str, Any] = field(default_factory=dict)
    scale: tuple[float, float] | None = None
    goals: list[float] = field(default_factory=list)
    sampled: Steering | None = None
    greedy: Steering | None = None
    bins: list[tuple[float, float]] = field(default_factory=list)
    unlearning: dict[tuple[str, str], list[Estimate]] = field(default_factory=dict)
    best_seen: list[Estimate] = field(default_factory=list)
    best_known: list[Estimate] = field(default_factory=list)
    p99: list[Estimate] = field(default_factory=list)
    p99_score: float | None = None
    discrimination: dict[str, Estimate] = field(default_factory=dict)
    tokens: list[Estimate] = field(default_factory=list)
    controlled: list[Estimate] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def guidance(self) -> str:
        """How sampling was guided, in words; "" where it was not."""
        given = self.about.get("guidance")
        if not isinstance(given, dict):
            return ""
        weight, floor = as_number(given.get("weight")), as_number(given.get("plausibility"))
        told = [f"guidance {weight:g} against {given.get('against')}"] if weight else []
        return ", ".join([*told, f"floor {floor:g}"] if floor else told)

    @property
    def empty(self) -> bool:
        """Whether it has nothing to show."""
        of_samples = (
            self.sampled,
            self.greedy,
            self.best_seen,
            self.best_known,
            self.p99,
            self.tokens,
            self.controlled,
        )
        return not any((*of_samples, self.unlearning, self.discrimination, self.samples))


class _Unfit(Exception):
    """A part that isn't as it should be."""


def read_evaluation(path: Path) -> Evaluation:
    """Read it; never raises for what stands in the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace") or "null")
    except (ValueError, RecursionError):
        return Evaluation(faults=["evaluation.json is no JSON, cut off perhaps; its figures are left out"])
    if not found:
        return Evaluation(faults=["evaluation.json is empty"])
    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = found.get("version") if isinstance(found, dict) else None
        return Evaluation(
            faults=[
                f"evaluation.json is of version {version!r}, and this report reads version {VERSION}: its figures are "
                "left out. Write the report with the rap-lightning that evaluated, or evaluate again"
            ]
        )
    return _parsed(found)


def _parsed(found: dict[str, Any]) -> Evaluation:
    result = Evaluation({key: found[key] for key in ABOUT if found.get(key) is not None})
    scale = found.get("scale")
    if isinstance(scale, dict):
        low, high = as_number(scale.get("low")), as_number(scale.get("high"))
        result.scale = (low, high) if low is not None and high is not None and low < high else None
    goals = [as_number(goal) for goal in found["goals"]] if isinstance(found.get("goals"), list) else []
    result.goals = [goal for goal in goals if goal is not None]
    fills: dict[str, Callable[[Evaluation, dict[str, Any]], None]] = {
        "controllability": _controllability,
        "unlearning": _unlearning,
        "extrapolation": _extrapolation,
        "discrimination": _discrimination,
        "length": _length,
    }
    for name, fill in fills.items():
        part = found.get(name)
        if part is None:
            continue
        try:
            fill(result, _dict(part))
        except _Unfit as error:
            result.faults.append(f"{name} in evaluation.json is left out: {error}")
    try:
        result.samples = [_sample(one) for one in _list(found.get("samples") or [])]
    except _Unfit as error:
        result.faults.append(f"samples in evaluation.json are left out: {error}")
    _without_goal(result, found.get("without_goal"))
    result.faults += [f"{name} not measured: {why}" for name, why in _texts(found.get("left_out"))]
    result.faults += [text for name, text in _texts(found) if name == "note"]
    without = as_number(found["trouble"].get("without_score")) if isinstance(found.get("trouble"), dict) else None
    if without:
        result.faults.append(f"{without:,.0f} sampled responses have no score")
    if result.empty and not result.faults:
        result.faults.append("evaluation.json has none of the parts that are shown")
    return result


def _controllability(result: Evaluation, part: dict[str, Any]) -> None:
    both = {}
    for kind in ("sampled", "greedy"):
        if (given := part.get(kind)) is None:
            continue
        given = _dict(given)
        argmax = given["argmax"] if isinstance(given.get("argmax"), dict) else {}
        goal = as_number(argmax.get("goal"))
        shares = argmax.get("shares")
        share = None
        if goal in result.goals and isinstance(shares, list) and len(shares) == len(result.goals):
            share = as_number(shares[result.goals.index(goal)])
        mean = _by_goal(result, given, "mean")
        both[kind] = Steering(mean, None, _estimate(given, "spearman"), _estimate(given, "slope"), goal, share)
    result.sampled, result.greedy = both.get("sampled"), both.get("greedy")


def _without_goal(result: Evaluation, apart: Any) -> None:
    """The scores of prompts without a goal, which stand apart from the lists by goal."""
    part = apart.get("controllability") if isinstance(apart, dict) else None
    for kind in ("sampled", "greedy"):
        given, steering = part.get(kind) if isinstance(part, dict) else None, getattr(result, kind)
        if isinstance(given, dict) and steering is not None:
            setattr(result, kind, replace(steering, unasked=_as_estimate(given.get("mean"))))


def _unlearning(result: Evaluation, part: dict[str, Any]) -> None:
    bins = []
    for one in _list(part.get("bins")):
        low, high = (as_number(end) for end in one) if isinstance(one, list) and len(one) == 2 else (None, None)
        if low is None or high is None:
            raise _Unfit(f"expected bins as [low, high], found {str(one)[:60]}")
        bins.append((low, high))
    curves = {}
    for condition, roles in _dict(part.get("conditions")).items():
        for role, figures in _dict(roles).items():
            curves[str(condition), str(role)] = _estimates(figures, len(bins), f"{condition}, {role}", "bins")
    result.bins, result.unlearning = bins, curves


def _extrapolation(result: Evaluation, part: dict[str, Any]) -> None:
    best = {name: _by_goal(result, part, name) for name in ("best_seen", "best_known") if part.get(name) is not None}
    if (p99 := part.get("p99")) is not None:
        result.p99, result.p99_score = _by_goal(result, _dict(p99), "share"), as_number(p99.get("score"))
    result.best_seen, result.best_known = best.get("best_seen", []), best.get("best_known", [])


def _discrimination(result: Evaluation, part: dict[str, Any]) -> None:
    result.discrimination = {name: _estimate(part, name) for name in ("spearman", "pair_accuracy") if name in part}


def _length(result: Evaluation, part: dict[str, Any]) -> None:
    for name in ("tokens", "controlled"):
        if part.get(name) is not None:
            setattr(result, name, _by_goal(result, part, name))


def _by_goal(result: Evaluation, part: dict[str, Any], name: str) -> list[Estimate]:
    return _estimates(part.get(name), len(result.goals), name, "goals")


def _texts(given: Any) -> list[tuple[str, str]]:
    return [(str(k), v) for k, v in given.items() if isinstance(v, str)] if isinstance(given, dict) else []


def _estimates(given: Any, wanted: int, name: str, of: str) -> list[Estimate]:
    figures = _list(given)
    if len(figures) != wanted:
        raise _Unfit(f"{name} has {len(figures)} figures for {wanted} {of}")
    return [_as_estimate(figure) for figure in figures]


def _estimate(part: dict[str, Any], name: str) -> Estimate:
    found = _as_estimate(part.get(name))
    why = part.get("why") if found.value is None and not found.why else None
    return Estimate(None, why=why) if isinstance(why, str) else found


def _as_estimate(given: Any) -> Estimate:
    if not isinstance(given, dict):
        return Estimate(as_number(given) if not isinstance(given, bool) else None)
    value, low, high = (as_number(given.get(key)) for key in ("value", "low", "high"))
    n, why = as_number(given.get("n")), given.get("why")
    whole = low is not None and high is not None and value is not None
    return Estimate(
        value, low if whole else None, high if whole else None, None if n is None else int(n),
        why if isinstance(why, str) else "",
    )  # fmt: skip


def _sample(given: Any) -> Sample:
    one = _dict(given)
    return sample_of(one, greedy=one.get("greedy") is True)


def sample_of(one: dict[str, Any], greedy: bool = False) -> Sample:
    """A sample as a line of JSON has it."""
    tokens = as_number(one.get("tokens"))
    return Sample(
        str(one.get("prompt", "")), as_number(one.get("goal")), str(one.get("response", "")),
        as_number(one.get("score")), None if tokens is None else int(tokens), greedy,
    )  # fmt: skip


def _dict(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _Unfit(f"expected an object, found {str(given)[:60]}")
    return given


def _list(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise _Unfit(f"expected a list, found {str(given)[:60]}")
    return given
