"""Does the goal steer: scores against goals, after training and on the way."""

from __future__ import annotations

from rap_lightning.reporting.curves import as_number
from rap_lightning.reporting.evaluation import Estimate, Evaluation, Steering
from rap_lightning.reporting.panels import Panel, Picture, Series, estimate
from rap_lightning.reporting.parts.base import (
    Part,
    evaluate_command,
    evaluated,
    evaluation_part,
    on_scale,
    room,
    scales,
)
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.text import number

LOOK = (
    "Look for a line that climbs along the dashed diagonal: there the policy writes what it is asked for; a flat line "
    "ignores the goal."
)
UNASKED = "asked for no score"
KEY = (
    "Spearman: 1 where a higher goal always scores higher, 0 where goals change nothing. Slope: points of score per "
    "point of goal. Best goal: the one with the highest mean score, and how sure that is (share of bootstrap draws). "
    "A dotted level line: no goal in the prompt."
)


def steering(runs: list[Run]) -> Part:
    """Controllability of evaluation.json; without it, the table that fit printed; and samples.jsonl."""
    heats = sorted({_heat(found) for _, found in evaluated(runs) if found.sampled})
    panels = _panels(runs, "sampled", f"sampled, temperature {' or '.join(heats)}")
    panels += _panels(runs, "greedy", "greedy decoding")
    stats = [_summed_up(run, kind, one) for run, found in evaluated(runs) for kind, one in _kinds(found)]
    head = ["run", "Spearman", "slope", "best goal"]
    picture = Picture("steering", "Score against goal", LOOK, panels, shared=False, stats=(head, stats), key=KEY)
    about = "The prompt asks for a score; a judge then scores what comes back."
    part = Part("steering", "Does the goal steer?", about, [picture])
    part = evaluation_part(part, runs, lambda found: found.sampled)
    if not part.pictures:
        part.pictures.extend(_from_fit(runs))
    part.pictures.extend(_over_time(runs))
    return part


def _panels(runs: list[Run], kind: str, title: str) -> list[Panel]:
    """Scores against goals, for each scale; a run's score without any goal is a level line."""
    among, panels = scales(runs), []
    for scale in among:
        curves = [
            (run, found.goals, one)
            for run, found in evaluated(runs)
            for name, one in _kinds(found)
            if run.scale == scale and name == kind
        ]
        series = [Series(run.index, goals, one.mean) for run, goals, one in curves if goals]
        asked = [goal for _, goals, _ in curves for goal in goals]
        ends = scale or (min(asked, default=0.0), max(asked, default=1.0))
        series += [
            Series(run.index, ends, [one.unasked] * 2, style="level", what=UNASKED)
            for run, _, one in curves
            if one.unasked is not None
        ]
        panels.append(
            Panel(title + on_scale(scale, among), "goal: score asked for", "mean score", series, identity=scale,
                  limits=room(scale, series))
        )  # fmt: skip
    return [panel for panel in panels if panel.runs]


def _heat(found: Evaluation) -> str:
    return ", ".join(filter(None, [number(as_number(found.about.get("temperature"))), found.guidance]))


def _kinds(found: Evaluation) -> list[tuple[str, Steering]]:
    return [(kind, one) for kind, one in (("sampled", found.sampled), ("greedy", found.greedy)) if one is not None]


def _summed_up(run: Run, kind: str, one: Steering) -> list[str]:
    sure = f" ({number(one.best_goal_share, True)})" if one.best_goal_share is not None else ""
    best = number(one.best_goal) + sure if one.best_goal is not None else "–"
    return [f"{run.name}, {kind}", estimate(one.spearman), estimate(one.slope), best]


def _from_fit(runs: list[Run]) -> list[Picture]:
    """Without an evaluation, the table that fit printed; it has no intervals."""
    found = [(run, run.curves.steering()) for run in runs if run.curves is not None]
    found = [(run, points) for run, points in found if len(points) > 1]
    if not found:
        return []
    series = [Series(run.index, [g for g, _ in points], [Estimate(s) for _, s in points]) for run, points in found]
    among = {run.scale for run, _ in found}
    scale = next(iter(among)) if len(among) == 1 else None
    panel = Panel(
        "samples taken by fit", "goal: score asked for", "mean score", series, identity=scale,
        limits=room(scale, series),
    )  # fmt: skip
    missing = [(run.index, "no intervals without an evaluation", evaluate_command(run)) for run, _ in found]
    look = "Look for a line that climbs along the dashed diagonal; without intervals, small differences mean nothing."
    return [Picture("steering", "Score against goal, as fit's own samples have it", look, [panel], missing=missing)]


def _over_time(runs: list[Run]) -> list[Picture]:
    """Scores at the lowest and the highest goal while training went on, from samples.jsonl."""
    panels = []
    for run in runs:
        goals = sorted({goal for by_goal in run.steering.values() for goal in by_goal})
        if len(goals) < 2 or len(run.steering) < 2:
            continue
        series = []
        for goal, which in ((goals[0], "lowest"), (goals[-1], "highest")):
            at = [step for step in run.steering if goal in run.steering[step]]
            means = [Estimate(run.steering[step][goal]) for step in at]
            series.append(Series(run.index, at, means, what=f"asked for {number(goal)}, the {which}", named=True))
        panels.append(Panel(run.name, "optimizer step", "mean score", series, whole=True))
    look = "Look for two lines that part: the upper asks for the highest goal, the lower for the lowest."
    key = "From samples.jsonl; few samples at each step, so the lines are rough."
    return [Picture("steering-over-time", "Score while training went on", look, panels, key=key)] if panels else []
