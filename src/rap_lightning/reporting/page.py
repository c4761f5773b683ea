"""Puts the page together: one HTML file that needs nothing else, and a PNG per picture beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from rap_lightning import __version__
from rap_lightning.reporting import figures, tables
from rap_lightning.reporting.headline import headline
from rap_lightning.reporting.panels import Picture
from rap_lightning.reporting.parts import Part, all_parts, evaluate_command
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.text import clean, short

PAGE = "index.html"
MADE_BY = '<meta name="generator" content="rap-lightning report'
"""By which a page of ours is known."""

PROBES = (
    ("samples.jsonl", "GoalSamples", "Score while training went on"),
    ("likelihood.jsonl", "LikelihoodProbe", "Likelihood while training went on"),
)
"""Files of fit's callbacks, and what they would show."""


def write(runs: list[Run], folder: Path) -> list[Path]:
    """Write the page and its pictures into a folder that exists; the files written.

    The same run folders give the same bytes: the page has no date and no random ids.
    """
    names = [run.name for run in runs]
    parts = all_parts(runs)
    pictures = [picture for part in parts for picture in part.pictures]
    drawn: dict[str, list[dict[str, Any]]] = {}
    written = []
    with tqdm(pictures, "drawing", delay=2, file=sys.stderr, leave=False, disable=None) as progress:
        for picture in progress:
            drawn[picture.name] = _panels(picture, names)
            path = folder / f"{picture.name}.png"
            path.write_bytes(figures.png(picture, names))
            written.append(path)
    page = folder / PAGE
    page.write_text(_html(runs, names, parts, drawn), encoding="utf-8")
    return [page, *written]


def _panels(picture: Picture, names: list[str]) -> list[dict[str, Any]]:
    shown = []
    for i, panel in enumerate(picture.panels):
        drawing = figures.svg(panel, f"{picture.name}-{i}", figures.limits(picture, panel))
        shown.append({"title": panel.title, "svg": Markup(drawing), "alt": clean(panel.alt(names), 4000)})
    return shown


def _html(runs: list[Run], names: list[str], parts: list[Part], drawn: dict[str, list[dict[str, Any]]]) -> str:
    environment = Environment(
        loader=PackageLoader("rap_lightning.reporting", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = short
    samples, samples_told = tables.samples(runs)
    config_runs, config_rows = tables.config_rows(runs)
    version_runs, version_rows, versions = tables.version_rows(runs)
    return environment.get_template("page.html.jinja").render(
        version=__version__, made_by=Markup(MADE_BY), names=names, cards=tables.run_rows(runs),
        headline=headline(runs), parts=[part for part in parts if part.pictures],
        lacking=_lacking(runs, parts, samples), drawn=drawn,
        marks=[figures.marker(i) for i in range(len(runs))], colours=len(figures.COLOURS), palette=figures.COLOURS,
        samples=samples, samples_told=samples_told, data=tables.data_groups(runs), config_runs=config_runs,
        config_rows=config_rows, costs=tables.cost_rows(runs), version_runs=version_runs, version_rows=version_rows,
        versions=versions,
    )  # fmt: skip


def _lacking(runs: list[Run], parts: list[Part], samples: list[tables.SideBySide]) -> list[tuple[str, str, list[str]]]:
    """Parts that no run has files for: titles, why, commands; parts that the same commands bring stand together."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for part in parts:
        if not part.pictures:
            groups.setdefault((part.lacking, tuple(part.commands)), []).append(part.title)
    if not samples:
        groups.setdefault(("no run has been evaluated for it", tuple(map(evaluate_command, runs))), []).append(
            "Samples side by side"
        )
    for name, callback, title in PROBES:
        if not any((run.folder / name).is_file() for run in runs):
            how = f"rap-lightning fit --config CONFIG --trainer.callbacks+=rap_lightning.callbacks.{callback}"
            groups.setdefault((f"no run folder has a {name}, which a callback writes", (how,)), []).append(title)
    if not any(run.data for run in runs):
        groups.setdefault(("no run folder has a data_report.json, which fit writes", ()), []).append("The data report")
    if len(runs) > 1 and sum(bool(run.config) for run in runs) < 2:
        groups.setdefault(("fewer than two run folders have a config.yaml, which fit writes", ()), []).append("Configs")
    if not any(run.record for run in runs):
        groups.setdefault(("no run folder has a run.json, which fit writes", ()), []).append("Time, memory, versions")
    return [(" ".join(titles), f"{why[0].upper()}{why[1:]}.", list(how)) for (why, how), titles in groups.items()]
