"""How training went: metrics.csv, split by which half a pair came from."""

from __future__ import annotations

from rap_lightning.reporting.curves import TERM, as_number, thinned
from rap_lightning.reporting.evaluation import Estimate
from rap_lightning.reporting.panels import Panel, Picture, Series
from rap_lightning.reporting.parts.base import Part
from rap_lightning.reporting.read_runs import Run, as_dict
from rap_lightning.reporting.text import clean

ORIGINS = {
    "chosen-goal": "chosen-goal half: asked for the better score",
    "rejected-goal": "rejected-goal half: asked for the worse score",
    "unconditioned": "plain pairs: asked for no score",
}
ONE_ORIGIN = {"none": "unconditioned", "chosen": "chosen-goal", "rejected": "rejected-goal"}
"""The origin of all pairs of a run that was relabelled in one way only; metrics.csv then doesn't split them."""

PICTURES = (
    ("loss", "Loss", "loss", "Look for validation (with markers) that falls along with training (thin lines); where it "
     "turns up while training still falls, the run learns its pairs by heart."),
    ("rewards/margins", "Margin", "margin", "Look for lines that rise above zero in each half: the policy has moved "
     "towards the chosen response and away from the rejected one."),
    ("rewards/accuracies", "Accuracy", "pairs ranked right", "Look for lines well above one half, which is guessing; "
     "the distance between training and validation is what doesn't carry over to new pairs."),
)  # fmt: skip
LEVELS = {"rewards/margins": ((0.0, "no change"),), "rewards/accuracies": ((0.5, "guessing"),)}
ABOUT = (
    "Scored pairs become training pairs: one half asks for the better response's score and prefers it, the other asks "
    "for the worse response's score and prefers that one. Thin lines are training, markers are validation on pairs "
    "held out."
)
UNVALIDATED = "no validation, so its markers are training"
NO_SPLIT = f"{UNVALIDATED}; fit validates where the data have a test or validation split"
TURNED_OFF = f"{UNVALIDATED}: --trainer.limit_val_batches 0 turned it off"
SOONER = "rap-lightning fit --config CONFIG --trainer.val_check_interval BATCHES"
TERMS = (
    "What the loss reports of its parts, a panel for each (of a mixture, before their weights). Look for a part that "
    "rises while the whole falls: it is being paid for the others."
)


def training(runs: list[Run]) -> Part:
    """Loss and its parts, margin and accuracy; a panel for each origin that a run has."""
    pictures = []
    for metric, title, axis, look in PICTURES:
        panels = []
        for origin, told in ORIGINS.items():
            series = [one for run in runs for one in _curves(run, metric, origin)]
            panels.append(
                Panel(told, "optimizer step", axis, series, levels=LEVELS.get(metric, ()), whole=True,
                      percent=metric == "rewards/accuracies")
            )  # fmt: skip
        shown = [panel for panel in panels if panel.runs]
        pictures.append(Picture(f"training-{title.lower()}", title, look, shown))
    pictures.insert(1, _terms(runs))
    part = Part("training", "How training went", ABOUT, [picture for picture in pictures if picture.runs])
    if not part.pictures:
        part.lacking = "no run has figures in a metrics.csv, which fit writes"
        return part
    for run in runs:
        if run.curves is None:
            part.pictures[0].missing.append((run.index, "no metrics.csv, which fit leaves in a run's folder", ""))
        elif run.curves.values and not any(name.startswith("val/") for name in run.curves.values):
            part.pictures[0].missing.append((run.index, *_unvalidated(run)))
    return part


def _unvalidated(run: Run) -> tuple[str, str]:
    """Why a run was not validated, and the command that does it."""
    splits = list(dict.fromkeys(str(part.get("split")) for part in run.data if part.get("relabelled_pairs") != 0))
    if as_number(as_dict(run.config.get("trainer")).get("limit_val_batches")) == 0:
        return TURNED_OFF, ""
    if len(splits) < 2:
        return NO_SPLIT, ""
    finished = run.record.get("finished") is not None
    end = "it ended at step" if finished else "it was stopped at step" if run.stopped else "its last known step is"
    return (
        f"{UNVALIDATED}: its data have the split {clean(splits[-1], 40)}, and {end} {run.step or 0:,}, before the "
        "first validation was due",
        SOONER,
    )


def _terms(runs: list[Run]) -> Picture:
    """The loss's own terms: a panel for each, by origin."""
    names = [name for run in runs if run.curves is not None for name in run.curves.values]
    terms = sorted({match[1] for name in names if (match := TERM.fullmatch(name)) and match[1] not in ORIGINS})
    panels = []
    for term in terms:
        series = {origin: [one for run in runs for one in _curves(run, f"loss/{term}", origin)] for origin in ORIGINS}
        for origin, lines in series.items():
            half = f", {ORIGINS[origin]}" if sum(map(bool, series.values())) > 1 else ""
            panels.append(Panel(f"{clean(term, 60)}{half}", "optimizer step", "mean over pairs", lines, whole=True))
    shown = [panel for panel in panels if panel.runs]
    return Picture("training-terms", "Parts of the loss", TERMS, shown, shared=False)


def _curves(run: Run, metric: str, origin: str) -> list[Series]:
    """Training and validation of one half of a run's pairs."""
    if run.curves is None:
        return []
    found = {}
    for prefix, what in (("", "training"), ("val/", "validation")):
        name = f"{prefix}{metric}/{origin}"
        if name not in run.curves.values and origin == _only_origin(run):
            name = f"{prefix}{metric}"
        steps, values = thinned(run.curves.values.get(name, []))
        if steps:
            found[what] = steps, [Estimate(value) for value in values]
    bare = "validation" in found
    return [
        Series(run.index, steps, values, "bare" if bare and what == "training" else "marked", what)
        for what, (steps, values) in found.items()
    ]


def _only_origin(run: Run) -> str | None:
    """The origin of all pairs, where they have but one."""
    if run.curves is not None and any(name.endswith("-goal") for name in run.curves.values):
        return None
    return ONE_ORIGIN.get(run.relabel or "", "unconditioned")
