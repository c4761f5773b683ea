"""Extrapolation, discrimination and length, as evaluation.json has them."""

from __future__ import annotations

from rap_lightning.reporting.panels import Panel, Picture, Series
from rap_lightning.reporting.parts.base import Part, absent, evaluated, evaluation_part, goal_panels
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.text import number


def extrapolation(runs: list[Run]) -> Part:
    """Shares of samples as good as the best seen for the prompt, and as the best hundredth of the data."""
    p99 = sorted({number(found.p99_score) for _, found in evaluated(runs) if found.p99_score is not None})
    top = f"above {' or '.join(p99)}, the data's 99th percentile" if p99 else "above the 99th percentile"
    seen = "as good as the best seen for the prompt"
    panels = goal_panels(runs, lambda found: found.best_seen, seen, "share of samples", shares=True)
    known = "as good as the best known for the prompt"
    panels += goal_panels(runs, lambda found: found.best_known, known, "share of samples", shares=True)
    panels += goal_panels(runs, lambda found: found.p99, top, "share of samples", shares=True)
    missing = absent(runs, lambda found: found.best_seen, seen) + absent(runs, lambda found: found.best_known, known)
    missing += absent(runs, lambda found: found.p99, top)
    picture = Picture(
        "extrapolation", "Responses as good as the best in training, or better",
        "Look at the right end: how often the best goal brings a response that training hardly ever, or never, showed.",
        panels, shared=False, missing=missing,
        key="Best seen: the best response to the same prompt in training; best known: in the evaluated data.",
    )  # fmt: skip
    about = "Shares of sampled responses, by the goal they were asked for."
    part = Part("extrapolation", "Does it go beyond its data?", about, [picture])
    return evaluation_part(part, runs, lambda found: found.best_seen or found.best_known or found.p99)


def discrimination(runs: list[Run]) -> Part:
    """How well the policy itself tells good responses from bad ones."""
    panels = [
        _dots(runs, "spearman", Panel("rank correlation with the judge", "Spearman", "rank correlation with the judge",
              [], levels=((0.0, "no relation"),), limits=(-1.05, 1.05), by_run=True)),
        _dots(runs, "pair_accuracy", Panel("pairs ranked right", "share of pairs", "pairs ranked right", [],
              levels=((0.5, "guessing"),), limits=(-0.03, 1.03), percent=True, by_run=True)),
    ]  # fmt: skip
    missing = [
        (run.index, f"{name.replace('_', ' ')}: {figure.why or 'no figure'}", "")
        for run, found in evaluated(runs)
        for name, figure in found.discrimination.items()
        if figure.value is None
    ]
    picture = Picture(
        "discrimination", "Reading a score off the policy",
        "Look for dots far to the right of the dashed line: the policy knows good responses from bad ones.",
        [panel for panel in panels if panel.runs], shared=False, missing=missing,
    )  # fmt: skip
    about = "The policy's own score of a response is the goal under which that response is likeliest."
    part = Part("discrimination", "Can it tell good from bad?", about, [picture])
    return evaluation_part(part, runs, lambda found: found.discrimination)


def _dots(runs: list[Run], name: str, panel: Panel) -> Panel:
    """The panel with a dot for each run that has a figure of this name."""
    found = [(run, one.discrimination[name]) for run, one in evaluated(runs) if name in one.discrimination]
    shown = [(run, figure) for run, figure in found if figure.value is not None]
    panel.series.extend(Series(run.index, [i], [figure], what=run.name) for i, (run, figure) in enumerate(shown))
    return panel


def length(runs: list[Run]) -> Part:
    """Tokens per goal, and the score with length held constant."""
    panels = goal_panels(runs, lambda found: found.tokens, "length", "tokens")
    panels += goal_panels(runs, lambda found: found.controlled, "score with length held constant", "score", scores=True)
    picture = Picture(
        "length", "Length, and the score without it",
        "Look for a score that still climbs on the right: if only length climbs, the judge was won by length.", panels,
        shared=False,
    )  # fmt: skip
    part = Part("length", "Is it only longer?", "Judges tend to like long answers.", [picture])
    return evaluation_part(part, runs, lambda found: found.tokens or found.controlled)
