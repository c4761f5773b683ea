"""What the parts of the page share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rap_lightning.reporting.evaluation import Estimate, Evaluation
from rap_lightning.reporting.panels import Panel, Picture, Series
from rap_lightning.reporting.read_runs import Run, as_dict
from rap_lightning.reporting.text import number

CONDITIONS = {
    "none": "no goal in the prompt",
    "own": "each asked for its own score",
    "best": "asked for the best score",
    "worst": "asked for the worst score",
}
Scale = tuple[float, float] | None


@dataclass
class Part:
    """A part of the page. Without pictures it is only named, with the way to get it."""

    name: str
    title: str
    about: str
    pictures: list[Picture] = field(default_factory=list)
    lacking: str = ""
    commands: list[str] = field(default_factory=list)


def evaluate_command(run: Run) -> str:
    """What to type to get a run's evaluation: on its own data, and by the judge of its samples, where that is known."""
    data = as_dict(run.config.get("data"))
    source = as_dict(data.get("init_args", data)).get("source")
    source = source if isinstance(source, str) else "SCORED-DATA"
    judge = "--judge RewardModel --judge.model MODEL"
    for callback in as_dict(run.config.get("trainer")).get("callbacks") or []:
        named = as_dict(as_dict(callback).get("init_args")).get("judge")
        if isinstance(named, str):
            judge = f"--judge Function --judge.function {shlex.quote(named)}"
    model = shlex.quote(str(run.folder / "hf"))
    return f"rap-lightning evaluate --model {model} --source {shlex.quote(source)} {judge}"


def evaluated(runs: list[Run]) -> list[tuple[Run, Evaluation]]:
    """The runs that have an evaluation."""
    return [(run, run.evaluation) for run in runs if run.evaluation is not None]


def evaluation_part(part: Part, runs: list[Run], has: Callable[[Evaluation], object]) -> Part:
    """A part of evaluation.json: runs that lack it are named at its first picture, or it is lacking as a whole."""
    whys = list(dict.fromkeys(why for picture in part.pictures for _, why, _ in picture.missing))
    part.pictures = [picture for picture in part.pictures if picture.runs]
    without = [run for run in runs if run.evaluation is None or not has(run.evaluation)]
    if part.pictures:
        for run in without:
            why = "not evaluated" if run.evaluation is None else "its evaluation.json has no such part"
            part.pictures[0].missing.append((run.index, why, evaluate_command(run)))
    else:
        part.lacking = "; ".join(whys) or "no run has been evaluated for it"
        part.commands = [evaluate_command(run) for run in without]
    return part


def absent(
    runs: list[Run], figures: Callable[[Evaluation], Sequence[Estimate]], what: str
) -> list[tuple[int, str, str]]:
    """The evaluated runs in which none of these figures could be computed, and why."""
    found = []
    for run, one in evaluated(runs):
        shown = figures(one)
        if shown and all(figure.value is None for figure in shown):
            whys = dict.fromkeys(figure.why for figure in shown if figure.why)
            found.append((run.index, f"{what}: {'; '.join(whys) or 'no figures'}", ""))
    return found


def scales(runs: list[Run]) -> list[Scale]:
    """The reward scales of evaluated runs: scores on different ones never share axes."""
    return list(dict.fromkeys(run.scale for run, _ in evaluated(runs)))


def on_scale(scale: Scale, among: list[Scale]) -> str:
    """Names the scale in a title, where there are several."""
    return f", scale {number(scale[0])} to {number(scale[1])}" if len(among) > 1 and scale is not None else ""


def room(scale: Scale, series: list[Series]) -> Scale:
    """Limits of an axis of scores: the scale, and what lies outside it."""
    if scale is None:
        return None
    ends = [end for one in series for end in one.ends]
    margin = 0.03 * (scale[1] - scale[0])
    return min([scale[0], *ends]) - margin, max([scale[1], *ends]) + margin


def share_room(series: list[Series]) -> Scale:
    """Limits of an axis of shares: from none to a little above the highest, never far above all."""
    top = max((end for one in series for end in one.ends), default=0.0)
    return (-0.03 * top, min(1.03, 1.15 * top)) if top > 0 else None


def goal_panels(
    runs: list[Run], figures: Callable[[Evaluation], Sequence[Estimate]], title: str, y: str, *,
    shares: bool = False, scores: bool = False,
) -> list[Panel]:  # fmt: skip
    """A figure per goal: a panel for each scale that the runs' scores are on."""
    among, panels = scales(runs), []
    for scale in among:
        group = [(run, found) for run, found in evaluated(runs) if run.scale == scale and figures(found)]
        series = [Series(run.index, found.goals, figures(found)) for run, found in group]
        limits = room(scale, series) if scores else share_room(series) if shares else None
        identity = scale if scores else None
        title_here, x = title + on_scale(scale, among), "goal: score asked for"
        panels.append(Panel(title_here, x, y, series, identity=identity, percent=shares, limits=limits))
    return [panel for panel in panels if panel.runs]
