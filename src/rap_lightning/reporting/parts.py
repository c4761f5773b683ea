"""From runs to pictures: each part of the page, where its files are there, and how to get it where they aren't."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rap_lightning.reporting.curves import thinned
from rap_lightning.reporting.evaluation import Estimate, Evaluation
from rap_lightning.reporting.panels import Panel, Picture, Series, estimate
from rap_lightning.reporting.read import ONE_ORIGIN, Run
from rap_lightning.reporting.text import number

ORIGINS = {
    "chosen-goal": "chosen-goal half: asked for the better score",
    "rejected-goal": "rejected-goal half: asked for the worse score",
    "unconditioned": "plain pairs: asked for no score",
}
CONDITIONS = {
    "none": "no goal in the prompt",
    "own": "asked for the response's own score",
    "best": "asked for the best score",
    "worst": "asked for the worst score",
}
ROLES = ("chosen", "rejected")


@dataclass
class Part:
    """A part of the page. Without pictures it is only named, with the way to get it."""

    name: str
    title: str
    about: str
    pictures: list[Picture] = field(default_factory=list)
    lacking: str = ""
    commands: list[str] = field(default_factory=list)


def parts(runs: list[Run]) -> list[Part]:
    """All parts in the order of the page."""
    return [
        _steering(runs), _training(runs), _unlearning(runs), _extrapolation(runs), _discrimination(runs), _length(runs)
    ]  # fmt: skip


def evaluate_command(run: Run) -> str:
    """What to type to get a run's evaluation."""
    return f"rap-lightning evaluate --model {shlex.quote(str(run.folder / 'hf'))}"


def _part(
    name: str, title: str, about: str, pictures: list[Picture], runs: list[Run], has: Callable[[Run], bool]
) -> Part:
    """A part of evaluation.json; runs that lack it are named under its first picture."""
    without = [run for run in runs if not has(run)]
    part = Part(name, title, about, [picture for picture in pictures if picture.runs])
    if part.pictures:
        part.pictures[0].missing.extend((run.index, _why(run), evaluate_command(run)) for run in without)
    else:
        part.lacking = "no run has been evaluated for it"
        part.commands = [evaluate_command(run) for run in without]
    return part


def _why(run: Run) -> str:
    return "not evaluated" if run.evaluation is None else "its evaluation.json has no such part"


def _evaluated(runs: list[Run]) -> list[tuple[Run, Evaluation]]:
    return [(run, run.evaluation) for run in runs if run.evaluation is not None]


def _scales(runs: list[Run]) -> list[tuple[float, float] | None]:
    """The reward scales of evaluated runs: scores on different ones never share axes."""
    return list(dict.fromkeys(run.scale for run, _ in _evaluated(runs)))


def _on(scale: tuple[float, float] | None, several: bool) -> str:
    return f", scale {number(scale[0])} to {number(scale[1])}" if several and scale is not None else ""


# --- does the goal steer ---------------------------------------------------------------------------------------------


def _steering(runs: list[Run]) -> Part:
    panels, stats = [], []
    scales = _scales(runs)
    for scale in scales:
        group = [(run, found) for run, found in _evaluated(runs) if run.scale == scale]
        heats = sorted({number(_float(found.about.get("temperature"))) for _, found in group})
        for kind, title in (("sampled", f"sampled, temperature {' or '.join(heats)}"), ("greedy", "greedy decoding")):
            series = []
            for run, found in group:
                steering = found.sampled if kind == "sampled" else found.greedy
                if steering is None:
                    continue
                series.append(Series(run.index, found.goals, steering.mean))
                best = "–"
                if steering.best_goal is not None:
                    share = steering.best_goal_share
                    best = number(steering.best_goal) + (f" ({number(share, True)} of draws)" if share is not None else "")
                rho, slope = estimate(steering.spearman), estimate(steering.slope)
                stats.append([run.name, "sampled" if kind == "sampled" else "greedy", rho, slope, best])
            if series:
                panels.append(
                    Panel(title + _on(scale, len(scales) > 1), "goal: score asked for", "mean score", series,
                          identity=scale, limits=_room(scale, series))  # fmt: skip
                )
    pictures = [
        Picture(
            "steering", "Score against goal",
            "Look for a line that climbs along the dashed diagonal: there the policy writes what it is asked for; "
            "a flat line ignores the goal.",
            panels, shared=False, stats=(["run", "", "Spearman", "slope", "best goal"], stats) if stats else None,
            key="Spearman: 1 where a higher goal always scores higher, 0 where goals change nothing. Slope: points of "
            "score per point of goal. Best goal: the one with the highest mean score.",
        )
    ]  # fmt: skip
    part = _part(
        "steering", "Does the goal steer?",
        "The prompt asks for a score; a judge then scores what comes back.",
        pictures, runs, lambda run: run.evaluation is not None and run.evaluation.sampled is not None,
    )  # fmt: skip
    if not part.pictures:
        _from_fit(part, runs)
    _over_time(part, runs)
    return part


def _from_fit(part: Part, runs: list[Run]) -> None:
    """Without an evaluation, the table that fit printed; it has no intervals."""
    found = [(run, run.curves.steering()) for run in runs if run.curves is not None]
    found = [(run, points) for run, points in found if len(points) > 1]
    if not found:
        return
    series = [Series(run.index, [g for g, _ in points], [Estimate(s) for _, s in points]) for run, points in found]
    scales = {run.scale for run, _ in found}
    scale = next(iter(scales)) if len(scales) == 1 else None
    panel = Panel("samples taken by fit", "goal: score asked for", "mean score", series, identity=scale,
                  limits=_room(scale, series))  # fmt: skip
    part.pictures.append(
        Picture(
            "steering", "Score against goal, as fit's own samples have it",
            "Look for a line that climbs along the dashed diagonal; without intervals, small differences mean nothing.",
            [panel], missing=[(run.index, "no intervals without an evaluation", evaluate_command(run)) for run, _ in found],
        )
    )  # fmt: skip


def _over_time(part: Part, runs: list[Run]) -> None:
    """Scores at the lowest and the highest goal while training went on, from samples.jsonl."""
    panels = []
    for run in runs:
        goals = sorted({goal for by in run.steering.values() for goal in by})
        steps = [step for step, by in run.steering.items() if by]
        if len(goals) < 2 or len(steps) < 2:
            continue
        series = []
        for goal, which in ((goals[0], "lowest"), (goals[-1], "highest")):
            at = [step for step in steps if goal in run.steering[step]]
            means = [Estimate(run.steering[step][goal]) for step in at]
            series.append(Series(run.index, at, means, what=f"asked for {number(goal)}, the {which}", named=True))
        panels.append(Panel(run.name, "optimizer step", "mean score", series, whole=True))
    if panels:
        part.pictures.append(
            Picture(
                "steering-over-time", "Score while training went on",
                "Look for two lines that part: the upper asks for the highest goal, the lower for the lowest.",
                panels, key="From samples.jsonl; few samples at each step, so the lines are rough.",
            )
        )  # fmt: skip


def _room(scale: tuple[float, float] | None, series: list[Series]) -> tuple[float, float] | None:
    """Limits of the score axis: the scale, and what lies outside it."""
    if scale is None:
        return None
    ends = [e for one in series for _, y in one.points for e in (y.value, y.low, y.high) if e is not None]
    room = 0.03 * (scale[1] - scale[0])
    return min([scale[0], *ends]) - room, max([scale[1], *ends]) + room


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# --- training --------------------------------------------------------------------------------------------------------

TRAINING = (
    ("loss", "Loss", "loss", "Look for validation (with markers) that falls along with training (thin lines); where it "
     "turns up while training still falls, the run learns its pairs by heart."),
    ("rewards/margins", "Margin", "margin", "Look for lines that rise above zero in each half: the policy has moved "
     "towards the chosen response and away from the rejected one."),
    ("rewards/accuracies", "Accuracy", "pairs ranked right", "Look for lines well above one half, which is guessing; "
     "the distance between training and validation is what doesn't carry over to new pairs."),
)  # fmt: skip
LEVELS = {"rewards/margins": ((0.0, "no change"),), "rewards/accuracies": ((0.5, "guessing"),)}


def _training(runs: list[Run]) -> Part:
    pictures = []
    for metric, title, axis, look in TRAINING:
        panels = []
        for origin, told in ORIGINS.items():
            series = [one for run in runs for one in _curves(run, metric, origin)]
            if series:
                percent = metric == "rewards/accuracies"
                panels.append(Panel(told, "optimizer step", axis, series, levels=LEVELS.get(metric, ()),
                                    percent=percent, whole=True))  # fmt: skip
        pictures.append(Picture(f"training-{axis.split()[0]}", title, look, panels))
    pictures = [picture for picture in pictures if picture.runs]
    about = (
        "Scored pairs become training pairs: one half asks for the better response's score and prefers it, the other "
        "asks for the worse response's score and prefers that one. Thin lines are training, markers are validation on "
        "pairs held out."
    )
    part = Part("training", "How training went", about, pictures)
    if not pictures:
        part.lacking = "no run has figures in metrics.csv"
        part.commands = ["rap-lightning fit --config configs/quickstart.yaml"]
        return part
    for run in runs:
        if run.curves is None:
            pictures[0].missing.append((run.index, "no metrics.csv: fit leaves one in the run's folder", ""))
        elif not any(name.startswith("val/") for name in run.curves.values):
            pictures[0].missing.append(
                (run.index, "no validation: fit validates on a test or validation split, where the data have one", "")
            )
    return part


def _curves(run: Run, metric: str, origin: str) -> list[Series]:
    """Training and validation of one half of a run's pairs."""
    if run.curves is None:
        return []
    found = []
    for prefix in ("", "val/"):
        name = f"{prefix}{metric}/{origin}"
        if name not in run.curves.values and origin == _only_origin(run):
            name = f"{prefix}{metric}"
        steps, values = thinned(run.curves.values.get(name, []))
        if steps:
            what = "validation" if prefix else "training"
            found.append(Series(run.index, steps, [Estimate(v) for v in values], "marked" if prefix else "bare", what))
    if len(found) == 1 and found[0].style == "bare":  # without validation, markers go on the training line
        found.append(Series(run.index, found[0].x, found[0].y, "marked", "training"))
        del found[0]
    return found


def _only_origin(run: Run) -> str | None:
    """The origin of all pairs, where they have but one; then metrics.csv has no column per origin."""
    if run.curves is not None and any(name.endswith("-goal") for name in run.curves.values if "steering" not in name):
        return None
    return ONE_ORIGIN.get(run.relabel or "", "unconditioned")


# --- unlearning ------------------------------------------------------------------------------------------------------


def _unlearning(runs: list[Run]) -> Part:
    open_panels, more = [], []
    for condition, told in CONDITIONS.items():
        for role in ROLES:
            series = [
                Series(run.index, [(low + high) / 2 for low, high in found.bins], found.unlearning[condition, role])
                for run, found in _evaluated(runs) if (condition, role) in found.unlearning
            ]  # fmt: skip
            if series:
                title = f"{role} responses; {told}"
                panel = Panel(title, "reward of the response", "change of log-prob, nats", series,
                              levels=((0.0, "as before training"),))  # fmt: skip
                (open_panels if condition in ("none", "own") else more).append(panel)
    pictures = [
        Picture(
            "unlearning", "What became likelier, and what was unlearned",
            "Look at the right end of the rejected responses: good ones that lost narrowly should not fall far below "
            "the line.",
            open_panels,
            key="A change of -1 nat makes a response about a third as likely as the untrained model has it.",
        ),
        Picture(
            "unlearning-extremes", "The same, asked for the best and for the worst score",
            "Look for opposite slopes: asked for the best score, good responses should rise; asked for the worst, bad "
            "ones.",
            more,
        ),
    ]  # fmt: skip
    part = _part(
        "unlearning", "Is good work unlearned?",
        "Preference training makes rejected responses less likely, also good ones that lost to better ones.",
        pictures, runs, lambda run: run.evaluation is not None and bool(run.evaluation.unlearning),
    )  # fmt: skip
    _likelihood(part, runs)
    return part


def _likelihood(part: Part, runs: list[Run]) -> None:
    """Good rejected and bad chosen responses while training went on, from likelihood.jsonl."""
    panels = []
    for condition, told in CONDITIONS.items():
        for role, which, good in (("rejected", "the best rejected", True), ("chosen", "the worst chosen", False)):
            series = []
            for run in runs:
                probes = [p for p in run.likelihood if (p.condition, p.role) == (condition, role)]
                if not probes:
                    continue
                edge = (max if good else min)((p.low, p.high) for p in probes)
                points = {p.step: p.change for p in probes if (p.low, p.high) == edge}
                what = f"reward {number(edge[0])} to {number(edge[1])}"
                steps = sorted(points)
                series.append(Series(run.index, steps, [Estimate(points[s]) for s in steps], what=what))
            if series:
                bins = " or ".join(sorted({one.what for one in series}))
                panels.append(Panel(f"{which} responses ({bins}); {told}", "optimizer step", "change of log-prob, nats",
                                    series, levels=((0.0, "as before training"),), whole=True))  # fmt: skip
    if panels:
        part.pictures.append(
            Picture(
                "likelihood", "The same while training went on",
                "Look for the best rejected responses staying near the line: a steady fall unlearns good work.", panels,
            )
        )  # fmt: skip


# --- by goal ---------------------------------------------------------------------------------------------------------


def _by_goal(
    runs: list[Run], figures: Callable[[Evaluation], Sequence[Estimate]], title: str, y: str, percent: bool = False,
    scaled: bool = False,
) -> list[Panel]:  # fmt: skip
    """A panel of a figure per goal; one per scale where scores are shown."""
    scales = _scales(runs)
    panels = []
    for scale in scales:
        series = [
            Series(run.index, found.goals, figures(found))
            for run, found in _evaluated(runs) if run.scale == scale and figures(found)
        ]  # fmt: skip
        ends = (-0.03, 1.03) if percent else None
        room = _room(scale, series) if scaled else ends
        panels.append(Panel(title + _on(scale, len(scales) > 1), "goal: score asked for", y, series, percent=percent,
                            identity=scale if scaled else None, limits=room))  # fmt: skip
    return [panel for panel in panels if panel.runs]


def _extrapolation(runs: list[Run]) -> Part:
    p99 = sorted({number(found.p99_score) for _, found in _evaluated(runs) if found.p99_score is not None})
    top = f"at or above {' or '.join(p99)}, the data's 99th percentile" if p99 else "at or above the 99th percentile"
    panels = _by_goal(runs, lambda found: found.best_seen, "as good as the best seen for the prompt", "share", True)
    panels += _by_goal(runs, lambda found: found.p99, top, "share", True)
    picture = Picture(
        "extrapolation", "Responses as good as the best in training, or better",
        "Look at the right end: how often the best goal brings a response that training hardly ever, or never, showed.",
        panels, shared=False,
    )  # fmt: skip
    return _part(
        "extrapolation", "Does it go beyond its data?", "Shares of sampled responses, by the goal they were asked for.",
        [picture], runs, lambda run: run.evaluation is not None and bool(run.evaluation.best_seen or run.evaluation.p99),
    )  # fmt: skip


def _discrimination(runs: list[Run]) -> Part:
    panels = []
    kinds = (
        ("spearman", "rank correlation with the judge", "Spearman", (-1.05, 1.05), ((0.0, "no relation"),), False),
        ("pair_accuracy", "pairs ranked right", "share of pairs", (-0.03, 1.03), ((0.5, "guessing"),), True),
    )
    for name, title, axis, limits, levels, percent in kinds:
        found = [(run, found.discrimination[name]) for run, found in _evaluated(runs) if name in found.discrimination]
        found = [(run, figure) for run, figure in found if figure.value is not None]
        series = [Series(run.index, [float(i)], [figure], what=run.name) for i, (run, figure) in enumerate(found)]
        if series:
            panels.append(Panel(title, axis, title, series, limits=limits, levels=levels, percent=percent, by_run=True))
    picture = Picture(
        "discrimination", "Reading a score off the policy",
        "Look for dots far to the right of the dashed line: the policy knows good responses from bad ones.", panels,
        shared=False,
    )  # fmt: skip
    return _part(
        "discrimination", "Can it tell good from bad?",
        "The policy's own score of a response is the goal under which that response is likeliest.",
        [picture], runs, lambda run: run.evaluation is not None and bool(run.evaluation.discrimination),
    )  # fmt: skip


def _length(runs: list[Run]) -> Part:
    panels = _by_goal(runs, lambda found: found.tokens, "length", "tokens")
    panels += _by_goal(runs, lambda found: found.controlled, "score with length held constant", "score", scaled=True)
    picture = Picture(
        "length", "Length, and the score without it",
        "Look for a score that still climbs on the right: if only length climbs, the judge was won by length.", panels,
        shared=False,
    )  # fmt: skip
    return _part(
        "length", "Is it only longer?", "Judges tend to like long answers.",
        [picture], runs, lambda run: run.evaluation is not None and bool(run.evaluation.tokens or run.evaluation.controlled),
    )  # fmt: skip
