"""The sections of charts: which figures of which file each one shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from rap_lightning.evaluation import Figure
from rap_lightning.reporting.charts import Chart, Line, shared_limits, with_interval
from rap_lightning.reporting.curves import thinned
from rap_lightning.reporting.evaluation_file import Evaluation
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.text import as_number, clean, number

ORIGIN_TITLES = {
    "chosen-goal": "chosen-goal pairs",
    "rejected-goal": "rejected-goal pairs",
    "unconditioned": "plain pairs",
    "best-goal": "best-goal pairs",
    "upper-goal": "pairs under drawn upper goals",
    "lower-goal": "pairs under drawn lower goals",
}
ONE_ORIGIN = {"none": "unconditioned", "chosen": "chosen-goal", "rejected": "rejected-goal"}
"""The origin of all pairs by relabelling mode, for modes with only one: metrics.csv doesn't split by origin then."""
TERM = re.compile(rf"(?:val/)?loss/(.+?)(?:/(?:{'|'.join(ORIGIN_TITLES)}))?")
CONDITIONS = {
    "none": "no goal", "own": "own reward as goal", "best": "highest goal", "worst": "lowest goal",
}  # fmt: skip


@dataclass
class Section:
    """A part of the page.

    Attributes:
        name: its id on the page, and the first part of its pictures' file names.
        title: its heading.
        about: what its charts show and how to read them.
        rows: of charts, each a row of the page where it is wide enough; empty where no run has the files.
        tables: head and rows.
        unknown: why charts have no values, as "title: reason".
    """

    name: str
    title: str
    about: str
    rows: list[list[Chart]] = field(default_factory=list)
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def charts(self) -> list[Chart]:
        """All charts of the section."""
        return [chart for row in self.rows for chart in row]

    @property
    def empty(self) -> bool:
        """Whether no run has the files."""
        return not self.rows and not self.tables


def all_sections(runs: list[Run]) -> list[Section]:
    """Return all sections in the order of the page; charts without a point are left out."""
    sections = [make(runs) for make in (steering, training, unlearning, extrapolation, discrimination, length)]
    for section in sections:
        for chart in section.charts:
            reasons = dict.fromkeys(figure.why for line in chart.lines for figure in line.y if figure.why)
            if reasons and not chart.drawn:
                section.unknown.append(f"{chart.title}: {'; '.join(reasons)}")
        drawn = ([chart for chart in row if chart.drawn] for row in section.rows)
        section.rows = [row for row in drawn if row]
    return sections


def steering(runs: list[Run]) -> Section:
    """Scores by goal: of evaluation.json; without one, of the SteeringTable callback; and of samples.jsonl."""
    section = Section(
        "steering", "Scores by goal",
        "Mean score that the judge gives to responses sampled at each goal. On the dashed diagonal, the score equals "
        "the goal. A dotted level line shows prompts without a goal. Error bars: 95% intervals over prompts.",
    )  # fmt: skip
    kinds = ("sampled", "greedy")
    section.rows.append([
        chart for kind in kinds for chart in _by_goal(runs, kind, ("controllability", kind, "mean"), "mean score", True)
    ])  # fmt: skip
    rows = [
        [
            f"{run.name}, {kind}",
            *(with_interval(one.figure("controllability", kind, name)) for name in ("spearman", "slope")),
            number(as_number(one.get("controllability", kind, "argmax", "goal"))),
        ]
        for run, one in evaluated(runs)
        for kind in kinds
        if one.get("controllability", kind) is not None
    ]
    if rows:
        section.tables.append((["run", "Spearman", "slope", "goal with the highest mean"], rows))
    else:
        lines = [
            Line(run.index, [goal for goal, _ in points], [Figure(score) for _, score in points])
            for run in runs
            if run.curves is not None and (points := run.curves.steering())
        ]
        section.rows.append([Chart("sampled by fit, without intervals", "goal", "mean score", lines)])
    section.rows.append([_steering_during_training(run) for run in runs if len(run.steering) > 1])
    return section


def training(runs: list[Run]) -> Section:
    """Loss and its terms, margin and accuracy by origin, from metrics.csv."""
    section = Section(
        "training", "Training curves",
        "Curves by origin of the pairs: in chosen-goal pairs, the goal is the better response's reward; in "
        "rejected-goal pairs, it is the worse response's, which is then preferred; plain pairs have no goal, "
        "best-goal pairs the best one, and drawn goals are nearer to the better (upper) or worse (lower) response. "
        "Thin lines: training; markers: validation on held-out pairs, or training where there is no validation.",
    )  # fmt: skip
    section.rows = [
        _by_origin(runs, "loss", "loss"),
        *(_by_origin(runs, f"loss/{term}", f"loss term {term}") for term in _terms(runs)),
        _by_origin(runs, "rewards/margins", "reward margin", level=0.0),
        _by_origin(runs, "rewards/accuracies", "accuracy", level=0.5, percent=True),
    ]
    return section


def unlearning(runs: list[Run]) -> Section:
    """Changes of log-probs by reward, of evaluation.json and of likelihood.jsonl."""
    section = Section(
        "unlearning", "Likelihood of the data's responses",
        "Change of a response's summed log-prob since before training, in nats: at -1, the response is about a third "
        "as likely as before. Good rejected responses far below 0 have been unlearned.",
    )  # fmt: skip
    after, during = [], []
    for condition, meaning in CONDITIONS.items():
        for role, edge, which in (("chosen", min, "worst"), ("rejected", max, "best")):
            lines = [line for run, one in evaluated(runs) for line in _by_reward(run, one, condition, role)]
            after.append(Chart(f"{role} responses, {meaning}", "reward", "log-prob change (nats)", lines, level=0.0))
            lines = [line for run in runs for line in _during_training(run, condition, role, edge)]
            title = f"{which} {role} responses during training, {meaning}"
            during.append(Chart(title, "step", "log-prob change (nats)", lines, level=0.0))
    section.rows = [_with_shared_limits(after), during]
    return section


def extrapolation(runs: list[Run]) -> Section:
    """Shares of samples that reach the best of the data."""
    section = Section(
        "extrapolation", "Responses as good as the best of the data",
        "Share of responses, by goal, that score at least as high as the best response to the same prompt in training "
        "(best seen) or in the evaluated data (best known), or above the 99th percentile of the data.",
    )  # fmt: skip
    charts = [
        (("extrapolation", "best_seen"), "best seen"), (("extrapolation", "best_known"), "best known"),
        (("extrapolation", "p99", "share"), "above the 99th percentile"),
    ]  # fmt: skip
    section.rows.append([
        chart for path, title in charts for chart in _by_goal(runs, title, path, "share of responses", percent=True)
    ])  # fmt: skip
    return section


def discrimination(runs: list[Run]) -> Section:
    """How well the policy's likelihoods tell good responses from bad ones; one number per run, so a table."""
    section = Section(
        "discrimination", "Scores read off the policy",
        "The goal under which a response is likeliest is the policy's own score of it. Spearman: its rank correlation "
        "with the judge's score (0: none). Pair accuracy: share of pairs ranked as the judge does (50%: guessing).",
    )  # fmt: skip
    rows = [
        [
            run.name,
            with_interval(one.figure("discrimination", "spearman")),
            with_interval(one.figure("discrimination", "pair_accuracy"), percent=True),
        ]
        for run, one in evaluated(runs)
        if one.get("discrimination")
    ]
    if rows:
        section.tables.append((["run", "Spearman", "pair accuracy"], rows))
    return section


def length(runs: list[Run]) -> Section:
    """Tokens by goal, and the score with length held constant."""
    section = Section(
        "length", "Length",
        "Judges tend to prefer long responses. The second chart shows the score with length held constant: if it is "
        "flat, the goal changes little but length.",
    )  # fmt: skip
    section.rows.append([
        *_by_goal(runs, "length", ("length", "tokens"), "response length (tokens)"),
        *_by_goal(runs, "score with length held constant", ("length", "controlled"), "score", scores=True),
    ])  # fmt: skip
    return section


def evaluated(runs: list[Run]) -> Iterator[tuple[Run, Evaluation]]:
    """Yield the runs that have an evaluation."""
    for run in runs:
        if run.evaluation is not None:
            yield run, run.evaluation


def _by_goal(
    runs: list[Run], title: str, path: tuple[str, ...], y: str, scores: bool = False, percent: bool = False
) -> list[Chart]:
    """Return a chart of the figures at a path of evaluation.json for each reward scale: scales never share axes.

    Where y is on that scale (``scores``), the diagonal and the score without a goal are drawn.
    """
    charts = []
    scales = list(dict.fromkeys(run.scale for run, _ in evaluated(runs)))
    for scale in scales:
        lines = []
        for run, one in evaluated(runs):
            if run.scale != scale:
                continue
            lines.append(Line(run.index, one.goals if one.figures(*path) else [], one.figures(*path)))
            unasked = one.figure("without_goal", *path)
            if scores and unasked.value is not None:
                ends = scale or (min(one.goals, default=0.0), max(one.goals, default=1.0))
                lines.append(Line(run.index, ends, [unasked] * 2, "no goal", "level"))
        on_scale = f", scale {number(scale[0])} to {number(scale[1])}" if len(scales) > 1 and scale else ""
        charts.append(Chart(title + on_scale, "goal", y, lines, scale if scores else None, percent=percent))
    return charts


def _steering_during_training(run: Run) -> Chart:
    """Return the mean score at the lowest and the highest goal by step."""
    goals = sorted({goal for by_goal in run.steering.values() for goal in by_goal})
    lines = []
    for goal in dict.fromkeys([goals[-1], goals[0]]):
        steps = [step for step in run.steering if goal in run.steering[step]]
        means = [Figure(run.steering[step][goal]) for step in steps]
        lines.append(Line(run.index, steps, means, f"goal {number(goal)}"))
    return Chart(f"during training, {run.name}", "step", "mean score", lines)


def _by_origin(runs: list[Run], metric: str, y: str, level: float | None = None, percent: bool = False) -> list[Chart]:
    charts = []
    for origin, meaning in ORIGIN_TITLES.items():
        lines = [line for run in runs for line in _curves(run, metric, origin)]
        charts.append(Chart(f"{clean(y, 60)}, {meaning}", "step", clean(y, 60), lines, level=level, percent=percent))
    return _with_shared_limits(charts)


def _curves(run: Run, metric: str, origin: str) -> Iterator[Line]:
    """Yield training and validation of the pairs of one origin."""
    if run.curves is None:
        return
    split = any(name.endswith("-goal") for name in run.curves.values)
    only = None if split else ONE_ORIGIN.get(run.relabel or "", "unconditioned")
    found = {}
    for prefix, what in (("", "training"), ("val/", "validation")):
        name = f"{prefix}{metric}/{origin}"
        if name not in run.curves.values and origin == only:
            name = f"{prefix}{metric}"
        if name in run.curves.values:
            found[what] = thinned(run.curves.values[name])
    for what, (steps, values) in found.items():
        thin = what == "training" and "validation" in found
        yield Line(run.index, steps, [Figure(value) for value in values], what, "thin" if thin else "marked")


def _terms(runs: list[Run]) -> list[str]:
    """Return the terms that the losses log as ``loss/NAME``."""
    names = [name for run in runs if run.curves is not None for name in run.curves.values]
    return sorted({found[1] for name in names if (found := TERM.fullmatch(name))} - ORIGIN_TITLES.keys())


def _by_reward(run: Run, evaluation: Evaluation, condition: str, role: str) -> Iterator[Line]:
    try:
        middles = [(low + high) / 2 for low, high in evaluation.get("unlearning", "bins") or []]
    except (TypeError, ValueError):
        return  # not a list of pairs of numbers
    figures = evaluation.figures("unlearning", "conditions", condition, role, count=len(middles))
    if figures:
        yield Line(run.index, middles, figures)


def _during_training(run: Run, condition: str, role: str, edge: Callable[..., tuple[float, float]]) -> Iterator[Line]:
    """Yield the curve of the run's best rejected, or worst chosen, bin of rewards."""
    probes = [probe for probe in run.likelihood if (probe.condition, probe.role) == (condition, role)]
    if probes:
        low, high = edge((probe.low, probe.high) for probe in probes)
        points = {probe.step: Figure(probe.change) for probe in probes if (probe.low, probe.high) == (low, high)}
        label = f"reward {number(low)} to {number(high)}"
        yield Line(run.index, sorted(points), [points[step] for step in sorted(points)], label)


def _with_shared_limits(charts: list[Chart]) -> list[Chart]:
    limits = shared_limits([line for chart in charts for line in chart.lines])
    return [replace(chart, limits=limits) for chart in charts]
