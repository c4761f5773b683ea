"""What the figures say, in a sentence, and what to mind before believing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rap_lightning.reporting.evaluation import Estimate
from rap_lightning.reporting.panels import estimate
from rap_lightning.reporting.read import Run
from rap_lightning.reporting.text import listed, number

COMPARABLE = ("judge", "temperature", "prompts", "samples_per_prompt", "seed")
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
        details = [_steers(run) for run in scored]
    else:
        outcome = _compared(scored) if len(scored) > 1 else _steers(scored[0])
        details = [_steers(run) for run in scored] if len(scored) > 1 else _ends(scored[0])
    return Headline(outcome, details, [*apart, *_caveats(runs)])


def _at(run: Run, which: Callable[[list[float]], float] = max) -> tuple[float, Estimate] | None:
    """The highest goal, or the lowest, and the score it brings."""
    found = run.evaluation
    if found is None or found.sampled is None or not found.goals:
        return None
    goal = which(found.goals)
    figure = found.sampled.mean[found.goals.index(goal)]
    return (goal, figure) if figure.value is not None else None


def _compared(runs: list[Run]) -> str:
    ranked = sorted(((run, _at(run)) for run in runs), key=lambda one: -(one[1][1].value or 0) if one[1] else 0)
    (first, best), (second, next_best) = ranked[:2]
    assert best is not None
    assert next_best is not None
    (goal, high), (_, low) = best, next_best
    asked, values = f"Asked for a score of {number(goal)}", f"{number(high.value)} against {number(low.value)}"
    of = f"of {second.name}{', the next' if len(runs) > 2 else ''}"
    if high.low is None or low.high is None:
        return f"{asked}, {first.name} scores highest: {values} {of}, without intervals."
    if high.low > low.high:
        return f"{asked}, {first.name} scores highest: {values} {of}."
    return f"{asked}, {first.name} and {second.name} can't be told apart: {values}, with intervals that overlap."


def _steers(run: Run) -> str:
    best, lowest = _at(run), _at(run, min)
    assert best is not None
    if lowest is None or lowest[0] == best[0]:
        return f"{run.name} scores {estimate(best[1])} when asked for {number(best[0])}."
    (high_goal, high), (low_goal, low) = best, lowest
    goals = f"as the goal goes from {number(low_goal)} to {number(high_goal)}"
    change = f"from {number(low.value)} to {number(high.value)} {goals}"
    if None in (high.low, high.high, low.low, low.high):
        return f"{run.name}: the mean score goes {change}, without intervals."
    if (high.low or 0) > (low.high or 0):
        return f"The goal steers {run.name}: its mean score rises {change}."
    if (high.high or 0) < (low.low or 0):
        return f"The goal steers {run.name} the wrong way: its mean score falls {change}."
    return f"No steering is shown for {run.name}: its mean score goes {change}, with intervals that overlap."


def _ends(run: Run) -> list[str]:
    best = _at(run)
    assert best is not None
    return [f"At the best goal: {estimate(best[1])}, a 95% interval over {best[1].n or 'its'} prompts."]


def _from_validation(runs: list[Run]) -> tuple[str, list[str]]:
    """Without evaluation, how many held-out pairs are ranked right."""
    found = [(run, run.curves.last("val/rewards/accuracies")) for run in runs if run.curves is not None]
    told = [f"{run.name} {number(value, True)}" for run, value in found if value is not None]
    if not told:
        return "What these runs write has not been evaluated yet; this page shows how they were trained.", []
    details = ["That is about ranking given responses, not about writing better ones: evaluate to know."]
    modes = {run.relabel for run, value in found if value is not None}
    if len(modes) > 1:
        details.append(
            "The runs hold out pairs of different kinds (with and without goals), so these shares don't compare."
        )
    return f"Of the pairs held out, so many are ranked right: {listed(told)}.", details


def _apart(runs: list[Run]) -> list[str]:
    """In what the evaluations differ, so that their scores don't compare."""
    found = []
    for name in ("scale", "highest goal", *COMPARABLE):
        values = [(run, _of(run, name)) for run in runs]
        if len({str(value) for _, value in values}) > 1:
            shown = listed([f"{_plain(value)} ({run.name})" for run, value in values])
            found.append(f"The evaluations differ in {name.replace('_', ' ')}: {shown}.")
    return found


def _of(run: Run, name: str) -> Any:
    assert run.evaluation is not None
    if name == "highest goal":
        return max(run.evaluation.goals)
    return run.scale if name == "scale" else run.evaluation.about.get(name)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{number(value[0])} to {number(value[1])}"
    return number(float(value)) if isinstance(value, int | float) else str(value)[:60]


def _caveats(runs: list[Run]) -> list[str]:
    found = [f"{run.name}: {note}." for run in runs for note in run.notes]
    if len(runs) < 2:
        return found
    steps = {run.step for run in runs if run.step}
    if len(steps) > 1:
        told = listed([f"{run.name} {run.step:,}" for run in runs if run.step])
        found.append(
            f"The runs took different numbers of optimizer steps ({told}): more training may explain a difference."
        )
    bases = {str((run.facts.get("base_model") or {}).get("name")) for run in runs if run.facts.get("base_model")}
    if len(bases) > 1:
        found.append(f"The runs began with different models: {listed(sorted(bases))}.")
    if len({str(run.goal.get("template")) for run in runs if run.goal}) > 1:
        found.append("The runs word their goals by different templates.")
    if all(run.record.get("seed") is not None for run in runs):
        found.append(
            "Intervals are over prompts. How much a run changes with its seed is not in them: repeat each with other "
            "seeds."
        )
    return found


def describe(run: Run) -> str:
    """What a run is, in a few words."""
    if not run.facts:
        return "evaluated only" if run.record == {} else "its run.json says nothing of the method"
    loss = (run.facts.get("loss") or {}).get("shown", "")
    mode = run.relabel
    halves = {
        "both": "pairs under both goals", "half": "half of the prompts under both goals",
        "chosen": "pairs under the better score only", "rejected": "pairs under the worse score only",
        "none": "plain pairs, no goals",
    }  # fmt: skip
    told = [str(loss), halves.get(mode or "", "")]
    if run.facts.get("adapter"):
        told.append(f"LoRA r={run.facts['adapter'].get('r')}")
    return ", ".join(one for one in told if one)
