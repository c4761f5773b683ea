"""Is good work unlearned: how log-probs of given responses changed, by what the responses are worth."""

from __future__ import annotations

from rap_lightning.reporting.evaluation import Estimate
from rap_lightning.reporting.panels import Panel, Picture, Series
from rap_lightning.reporting.parts.base import CONDITIONS, Part, evaluated, evaluation_part
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.text import number

ROLES = ("chosen", "rejected")
Y = "change of log-prob, nats"
LEVEL = ((0.0, "as before training"),)
LOOK = (
    "Look at the right end of the rejected responses: good ones that lost narrowly should not fall far below the line."
)
EXTREMES = (
    "Look for opposite slopes: asked for the best score, good responses should rise; asked for the worst, bad ones."
)
OVER_TIME = "Look for the best rejected responses staying near the line: a steady fall unlearns good work."
KEY = "A change of -1 nat makes a response about a third as likely as it was before training."


def unlearning(runs: list[Run]) -> Part:
    """Unlearning of evaluation.json, and likelihood.jsonl."""
    pictures = [
        Picture("unlearning", "What became likelier, and what was unlearned", LOOK, _panels(runs, "none", "own"), KEY),
        Picture("unlearning-extremes", "Asked for the best score, and for the worst", EXTREMES,
                _panels(runs, "best", "worst")),
    ]  # fmt: skip
    about = "Preference training makes rejected responses less likely, also good ones that lost to better ones."
    part = Part("unlearning", "Is good work unlearned?", about, pictures)
    part = evaluation_part(part, runs, lambda found: found.unlearning)
    part.pictures.extend(_over_time(runs))
    return part


def _panels(runs: list[Run], *conditions: str) -> list[Panel]:
    panels = []
    for condition in conditions:
        for role in ROLES:
            series = [
                Series(run.index, [(low + high) / 2 for low, high in found.bins], found.unlearning[condition, role])
                for run, found in evaluated(runs)
                if (condition, role) in found.unlearning
            ]
            title = f"{role} responses; {CONDITIONS[condition]}"
            panels.append(Panel(title, "reward of the response (middle of its bin)", Y, series, levels=LEVEL))
    return [panel for panel in panels if panel.runs]


def _over_time(runs: list[Run]) -> list[Picture]:
    """The best rejected and the worst chosen responses while training went on."""
    panels = []
    for condition, told in CONDITIONS.items():
        for role in reversed(ROLES):
            series = [one for run in runs for one in _probed(run, condition, role)]
            if series:
                which = "best" if role == "rejected" else "worst"
                bins = " or ".join(sorted({one.what for one in series}))
                title = f"{which} {role} ({bins}); {told}"
                panels.append(Panel(title, "optimizer step", Y, series, levels=LEVEL, whole=True))
    return [Picture("likelihood", "Likelihood while training went on", OVER_TIME, panels)] if panels else []


def _probed(run: Run, condition: str, role: str) -> list[Series]:
    """The curve of a run's highest bin for rejected responses, of its lowest for chosen ones."""
    probes = [probe for probe in run.likelihood if (probe.condition, probe.role) == (condition, role)]
    if not probes:
        return []
    edge = (max if role == "rejected" else min)((probe.low, probe.high) for probe in probes)
    points = {probe.step: Estimate(probe.change) for probe in probes if (probe.low, probe.high) == edge}
    steps = sorted(points)
    what = f"reward {number(edge[0])} to {number(edge[1])}"
    return [Series(run.index, steps, [points[step] for step in steps], what=what)]
