"""The page: one HTML file that needs no other, and a PNG of each picture next to it.

Read in this order: ``read_runs`` reads the runs, ``sections`` turns them into charts and ``tables`` into tables,
``charts`` draws, and ``page.html.jinja`` lays everything out.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rap_lightning import __version__
from rap_lightning.reporting import charts, tables
from rap_lightning.reporting.read_runs import Run
from rap_lightning.reporting.sections import all_sections
from rap_lightning.reporting.text import clean

PAGE = "index.html"
MADE_BY = '<meta name="generator" content="rap-lightning report'
"""Identifies a page that this module wrote."""


class Picture(NamedTuple):
    """A drawn chart: its file name without the ending, its SVG as an address, and its texts."""

    name: str
    address: str
    alt: str
    sentence: str
    table: tables.Table


def write(runs: list[Run], folder: Path) -> list[Path]:
    """Write the page and its pictures to an existing folder; return the files.

    The same run folders give the same bytes: the page has no date and no random ids.
    """
    names, sections = [run.name for run in runs], all_sections(runs)
    pictures: dict[str, list[list[Picture]]] = {}
    for section in sections:
        numbers = iter(range(1, len(section.charts) + 1))
        pictures[section.name] = [
            [_draw(chart, names, folder, f"{section.name}-{next(numbers)}") for chart in row] for row in section.rows
        ]
    environment = Environment(
        loader=PackageLoader("rap_lightning.reporting", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    samples, prompts = tables.samples(runs)
    differing, common = tables.version_rows(runs)
    text = environment.get_template("page.html.jinja").render(
        version=__version__, made_by=Markup(MADE_BY), runs=runs, names=names, colours=charts.COLOURS,
        headline=tables.headline(runs), notes=tables.notes(runs), pictures=pictures,
        sections=[section for section in sections if not section.empty], samples=samples, prompts=prompts,
        data=tables.data_rows(runs), config=tables.config_rows(runs), cost=tables.cost_rows(runs), versions=differing,
        common_versions=common, missing=list(tables.missing(runs, sections)),
    )  # fmt: skip
    (folder / PAGE).write_text(text, encoding="utf-8")
    return [folder / PAGE, *sorted(folder.glob("*.png"))]


def _draw(chart: charts.Chart, names: list[str], folder: Path, name: str) -> Picture:
    svg, png = charts.draw(chart, names, salt=name)
    (folder / f"{name}.png").write_bytes(png)
    address = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return Picture(name, address, chart.alt(names), clean(chart.sentence(names), 2000), chart.table(names))
