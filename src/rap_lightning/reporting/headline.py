"""What the figures say, in a sentence, and what to mind before believing it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rap_lightning.reporting.evaluation import Estimate
from rap_lightning.reporting.paired import difference
from rap_lightning.reporting.panels import estimate
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.text import isolated, listed, number

MANY = 4
"""More runs are told of in groups."""

STEERS, WRONG_WAY, NOT_SHOWN = "The goal steers", "Steered the wrong way", "No steering is shown"
COMPARABLE = (
    "judge", "temperature", "top_p", "max_new_tokens", "guidance", "prompts", "split", "samples_per_prompt", "seed"
)  # fmt: skip
"""Two evaluations that differ in one of these measured different things."""


@dataclass(frozen=True)
class Headline:
    """The outcome in one sentence, more sentences with the figures, and caveats."""

    outcome: str
    details: list[str]
    caveats: list[str]


def headline(runs: list[Run]) -> Headline:
    """From the figures alone; nothing is said that no figure shows."""
    scored = [run for run in runs if _at(run) is not None]
    apart = _apart(scored)
    if not scored:
        outcome, details = _from_validation(runs)
    elif apart and len(scored) > 1:
        outcome = "The runs were evaluated in different ways, so their scores are not compared."
        details = _steering(scored)
    elif len(scored) > 1:
        outcome, details = _compared(scored)
        details += _steering(scored)
    else:
        outcome, details = _steers(scored[0], short=True), _ends(scored[0])
    without = [_name(run) for run in runs if run not in scored]
    if scored and without:
        details.append(f"Not evaluated: {listed(without)}.")
    return Headline(outcome, details, [*apart, *_caveats(runs)])


def _at(run: Run, which: Callable[[list[float]], float] = max) -> tuple[float | None, Estimate] | None:
    """The highest goal, or the lowest, and the score it brings; None as the goal where none was ever asked for."""
    found = run.evaluation
    if found is None or found.sampled is None:
        return None
    goal = which(found.goals) if found.goals else None
    figure = found.sampled.unasked if goal is None else found.sampled.mean[found.goals.index(goal)]
    return (goal, figure) if figure is not None and figure.value is not None else None


def _compared(runs: list[Run]) -> tuple[str, list[str]]:
    """Who is ahead at the best goal, where intervals say so; a run that knows no goals takes part as it is."""
    found = [(run, at[0], at[1]) for run in runs if (at := _at(run)) is not None]
    (first, goal, high), (second, other, low) = sorted(found, key=lambda one: -(one[2].value or 0))[:2]
    asked = (
        "Asked for no score"
        if goal is other is None
        else f"Asked for a score of {number(other if goal is None else goal)}"
    )
    ahead, behind = _told(first, goal, other), _told(second, other, goal)
    values = f"{number(high.value)} against {number(low.value)}"
    of = f"{values} of {behind}{', the next' if len(runs) > 2 else ''}"
    apart = difference(first.scores.get(goal, {}), second.scores.get(other, {}))
    if apart is not None and apart.low is not None and apart.high is not None:
        told = f"On the same {apart.n} prompts the difference is {estimate(apart)}, a 95% interval."
        if apart.low > 0 or apart.high < 0:
            return f"{asked}, {ahead} scores highest: {of}.", [told]
        return f"{asked}, {ahead} and {behind} can't be told apart: {values}.", [told]
    if high.low is None or low.high is None:
        return f"{asked}, {ahead} scores highest: {of}, without intervals.", []
    if high.low > low.high:
        return f"{asked}, {ahead} scores highest: {of}.", []
    return f"{asked}, {ahead} scores highest: {of}, but their intervals overlap, so this may be chance.", []


def _told(run: Run, goal: float | None, other: float | None) -> str:
    return f"{_name(run)} (asked for none)" if goal is None and other is not None else _name(run)


def _ends(run: Run) -> list[str]:
    """The figure at the best goal, of a run that stands alone."""
    best = _at(run)
    assert best is not None
    if best[1].low is None:
        return [f"At the best goal: {estimate(best[1])}, without an interval."]
    found = [f"At the best goal: {estimate(best[1])}, a 95% interval over {best[1].n or 'its'} prompts."]
    if _verdict(run) in (STEERS, WRONG_WAY, NOT_SHOWN):
        found.append(f"Slope: {_slope(run)} points of score per point of goal.")
    return found


def _slope(run: Run) -> str:
    assert run.evaluation is not None
    assert run.evaluation.sampled is not None
    return estimate(run.evaluation.sampled.slope)


def _from_validation(runs: list[Run]) -> tuple[str, list[str]]:
    """Without evaluation: how many held-out pairs are ranked right, and what fit's own samples scored."""
    found = [(run, run.curves.last("val/rewards/accuracies")) for run in runs if run.curves is not None]
    told = [f"{_name(run)} {number(value, True)}" for run, value in found if value is not None]
    details = [_sampled_by_fit(run, run.curves.steering()) for run in runs if run.curves is not None]
    details = [line for line in details if line]
    one = len(runs) == 1
    if told:
        details.append(f"Of held-out pairs, so many are ranked right: {listed(told)}.")
        details.append("Ranking given responses is not writing better ones; evaluate to know how good they are.")
    return f"What {'this run writes' if one else 'these runs write'} has not been evaluated yet.", details


def _sampled_by_fit(run: Run, points: list[tuple[float, float]]) -> str:
    if len(points) < 2:
        return ""
    (low_goal, low), (high_goal, high) = points[0], points[-1]
    goals = f"as the goal goes from {number(low_goal)} to {number(high_goal)}"
    return f"{_name(run)}: the mean score of fit's few samples goes from {number(low)} to {number(high)} {goals}."


def _steering(runs: list[Run]) -> list[str]:
    """A sentence for each run; of many, one for each verdict."""
    if len(runs) <= MANY:
        return [_steers(run) for run in runs]
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(_verdict(run), []).append(_name(run))
    return [f"{verdict}: {listed(names)}." for verdict, names in groups.items()]


def _verdict(run: Run) -> str:
    """Whether the slope of score over goal is surely above, or below, zero."""
    assert run.evaluation is not None
    assert run.evaluation.sampled is not None
    slope = run.evaluation.sampled.slope
    if len(run.evaluation.goals) < 2:
        return "Evaluated without goals, or at one only"
    if slope.low is None or slope.high is None:
        return "Without an interval of the slope"
    return STEERS if slope.low > 0 else WRONG_WAY if slope.high < 0 else NOT_SHOWN


def _steers(run: Run, short: bool = False) -> str:
    best, lowest, verdict = _at(run), _at(run, min), _verdict(run)
    assert best is not None
    if lowest is None or lowest[0] == best[0]:
        asked = f"asked for {number(best[0])}" if best[0] is not None else "no goal is asked for"
        return f"{_name(run)} scores {estimate(best[1])} when {asked}."
    (high_goal, high), (low_goal, low) = best, lowest
    goals = f"as the goal goes from {number(low_goal)} to {number(high_goal)}"
    change = f"its mean score goes from {number(low.value)} to {number(high.value)} {goals}"
    change += "" if short else f", slope {_slope(run)}"
    return {
        STEERS: f"{STEERS} {_name(run)}: {change}.",
        WRONG_WAY: f"The goal steers {_name(run)} the wrong way: {change}.",
        NOT_SHOWN: f"{NOT_SHOWN} for {_name(run)}: {change}.",
    }.get(verdict, f"{_name(run)}: {change}, without an interval of the slope.")


def _name(run: Run) -> str:
    return isolated(run.name)


def _apart(runs: list[Run]) -> list[str]:
    """In what the evaluations differ, so that their scores don't compare."""
    found = []
    for name in ("scale", "highest goal", *COMPARABLE):
        values = [(run, value) for run in runs if (value := _of(run, name)) is not None]
        if len({str(value) for _, value in values}) > 1:
            shown = listed([f"{_plain(value)} ({_name(run)})" for run, value in values])
            found.append(f"The evaluations differ in {name.replace('_', ' ')}: {shown}.")
    return found


def _of(run: Run, name: str) -> Any:
    assert run.evaluation is not None
    if name == "highest goal":
        return max(run.evaluation.goals, default=None)
    if name == "guidance":  # files of before there was any say nothing of it
        return run.evaluation.guidance or "none"
    return run.scale if name == "scale" else run.evaluation.about.get(name)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{number(value[0])} to {number(value[1])}"
    return number(float(value)) if isinstance(value, int | float) else str(value)[:60]


def _caveats(runs: list[Run]) -> list[str]:
    found = [f"{_name(run)}: {note}." for run in runs for note in run.notes] + _without_base(runs)
    if len(runs) < 2:
        return found
    for run in runs:
        folders = [session.folder.resolve() for session in run.sessions if session.folder is not None]
        for other in (one for one in runs if one.folder.resolve() in folders):
            end = run.sessions[folders.index(other.folder.resolve())].end
            found.append(f"{_name(run)} goes on from {_name(other)}: up to step {end:,} they are one run.")
    steps = sorted({run.step for run in runs if run.step})
    if len(steps) > 1:
        told = listed([f"{_name(run)} {run.step:,}" for run in runs if run.step])
        told = told if len(runs) <= MANY else f"{steps[0]:,} to {steps[-1]:,}"
        found.append(f"The runs took different numbers of steps ({told}): more training may explain a difference.")
    if len({run.relabel for run in runs if run.curves is not None and run.relabel}) > 1:
        found.append(
            "The runs hold out pairs of different kinds (with and without goals), so their shares ranked right don't "
            "compare."
        )
    bases = {str((run.facts.get("base_model") or {}).get("name")) for run in runs if run.facts.get("base_model")}
    if len(bases) > 1:
        found.append(f"The runs began with different models: {listed(sorted(bases))}.")
    if len({str(run.goal.get("template")) for run in runs if run.goal}) > 1:
        found.append("The runs word their goals by different templates.")
    if any(run.evaluation is not None and not run.evaluation.empty for run in runs):
        found.append(
            "Intervals are over prompts. How much a run changes with its seed is not in them: repeat each with other "
            "seeds."
        )
    return found


def _without_base(runs: list[Run]) -> list[str]:
    """What training began with may steer already, and tell good from bad: a page without it can't say what is new."""
    measured = [run.evaluation.about for run in runs if run.evaluation is not None]
    models = {str(about.get("model")) for about in measured}
    for run in runs:
        base = str(run.evaluation.about.get("base") or "") if run.evaluation is not None else ""
        if base and base not in models:
            return [
                f"What {base}, where training began, does with goals isn't on this page: some of the steering may be "
                f"its own. Evaluate it with the same options, but --model {base} --goal_from {run.folder / 'hf'} "
                "--output base-evaluation, and add base=base-evaluation."
            ]
    return []


def _one_line(shown: str) -> str:
    """A mixture as ``Mixture(DPO(beta=0.1), SFT(), weights=[1.0, 0.2])``; torch writes it over many lines."""
    lines = [line.strip() for line in shown.splitlines()]
    parts = [part for line in lines if (part := re.sub(r"^\(\d+\): ", "", line)) != line]
    if not parts or any(part.count("(") != part.count(")") for part in parts):
        return " ".join(lines)
    options = [line for line in lines[1:] if line.strip(")") and not line.startswith("(")]
    return f"{lines[0]}{', '.join([*parts, *options])})"


def describe(run: Run) -> str:
    """What a run is, in a few words."""
    if not run.facts:
        evaluated = run.evaluation is not None and not run.evaluation.empty and run.curves is None
        return "an evaluation without a run" if evaluated else "its method isn't known"
    loss = _one_line(str((run.facts.get("loss") or {}).get("shown", "")))
    mode = run.relabel
    halves = {
        "both": "pairs under both goals", "half": "half of the prompts under both goals",
        "chosen": "pairs under the better score only", "rejected": "pairs under the worse score only",
        "none": "plain pairs, no goals",
    }  # fmt: skip
    told = [loss, halves.get(mode or "", "")]
    if run.facts.get("adapter"):
        told.append(f"LoRA r={run.facts['adapter'].get('r')}")
    return ", ".join(one for one in told if one)
