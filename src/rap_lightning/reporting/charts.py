"""Line charts: what they show as plain values, and their drawing by matplotlib.

``Chart`` holds the values, from which the picture, its sentence and its table are all made. ``draw`` returns the
picture as SVG for the page and as PNG for slides.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.evaluation import Figure
from rap_lightning.reporting.text import clean, listed, number

COLOURS = ("#2f78d0", "#d1590a", "#1a9168", "#c9468c", "#8064d0", "#128a9e", "#9c7016", "#757c86")
"""Each has a contrast above 3 with a white and with a dark background, so pictures need one colour for both."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "*")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))
IN_SENTENCE = 4
"""Lines that a chart's sentence gives the values of; its table has them all."""
ROWS = 9
"""Rows of a chart's table."""

Style = Literal["marked", "thin", "level"]

# The SVG is shown by an <img>, which does not inherit the page's colours and font: it brings its own.
_PAGE_STYLE = """text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif !important }
@media screen and (prefers-color-scheme: dark) {
  text { fill: #e8ecf1 }
  [style*="stroke: #000000"] { stroke: #e8ecf1 !important }
}
"""


@dataclass(frozen=True)
class Line:
    """A line of one run.

    Attributes:
        run: index of the run, which determines colour, marker and dashes.
        x, y: its points.
        label: distinguishes several lines of one run.
        style: "marked" has markers and intervals, "thin" is a plain line for dense values, "level" a dotted one.
    """

    run: int
    x: Sequence[float]
    y: Sequence[Figure]
    label: str = ""
    style: Style = "marked"

    @property
    def points(self) -> list[tuple[float, Figure]]:
        """The points that have a value."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y.value is not None]

    def name(self, names: list[str]) -> str:
        """The run's name, with the label."""
        return f"{names[self.run]}, {self.label}" if self.label else names[self.run]


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        title: what distinguishes it from the charts next to it.
        x, y: names of the axes.
        lines: lines without a point are not drawn.
        diagonal: ends of the dashed line y = x.
        level: where a thin horizontal line is drawn.
        percent: whether y is a share.
        limits: of y; chosen by matplotlib otherwise.
    """

    title: str
    x: str
    y: str
    lines: list[Line]
    diagonal: tuple[float, float] | None = None
    level: float | None = None
    percent: bool = False
    limits: tuple[float, float] | None = None

    @property
    def drawn(self) -> list[Line]:
        """The lines that have a point."""
        return [line for line in self.lines if line.points]

    @property
    def runs(self) -> list[int]:
        """The runs that it shows."""
        return sorted({line.run for line in self.drawn})

    def alt(self, names: list[str]) -> str:
        """Return the alternative text of the picture; its values are in the sentence and the table."""
        shown = listed([names[run] for run in self.runs])
        return clean(f"Line chart of {self.y} against {self.x}, {self.title}: {shown}")

    def sentence(self, names: list[str]) -> str:
        """Return what the chart shows: the first and the last value of each marked line."""
        lines = [line for line in self.drawn if line.style == "marked"]
        said = []
        for line in lines[:IN_SENTENCE]:
            (x0, y0), (x1, y1) = line.points[0], line.points[-1]
            start = f"goes from {number(y0.value, self.percent)} at {self.x} {number(x0)} to " if x0 != x1 else "is "
            said.append(f"{start}{number(y1.value, self.percent)} at {self.x} {number(x1)} in {line.name(names)}")
        more = f"; {len(lines) - IN_SENTENCE} more are in the table" if len(lines) > IN_SENTENCE else ""
        return f"{self.y[:1].upper()}{self.y[1:]} {', and '.join(said)}{more}."

    def table(self, names: list[str]) -> tuple[list[str], list[list[str]]]:
        """Return head and rows of the values; of long curves, ROWS steps spread evenly."""
        lines = [line for line in self.drawn if line.style != "level"]
        places = sorted({x for line in lines for x, _ in line.points})
        if len(places) > ROWS:
            places = [places[round(i * (len(places) - 1) / (ROWS - 1))] for i in range(ROWS)]
        columns = [{x: with_interval(y, self.percent) for x, y in line.points} for line in lines]
        rows = [[number(x), *(column.get(x, "") for column in columns)] for x in places]
        for line in self.drawn:
            if line.style == "level":
                rows.append([line.name(names), with_interval(line.points[0][1], self.percent)])
        return [self.x, *(line.name(names) for line in lines)], rows


def with_interval(figure: Figure, percent: bool = False) -> str:
    """Return ``6.75 (6.4 to 7.1)``, or the reason why there is no value."""
    if figure.value is None:
        return f"– ({figure.why})" if figure.why else "–"
    if figure.low is None:
        return number(figure.value, percent)
    low, high = number(figure.low, percent), number(figure.high, percent)
    return f"{number(figure.value, percent)} ({low}\u00a0to\u00a0{high})"


def shared_limits(lines: list[Line]) -> tuple[float, float] | None:
    """Return common limits of y for charts that are compared; single spikes of dense curves are cut off."""
    low, high = math.inf, -math.inf
    for line in lines:
        ends = sorted(end for _, y in line.points for end in (y.value, y.low, y.high) if end is not None)
        cut = len(ends) // 100 if line.style == "thin" else 0
        if ends:
            low, high = min(low, ends[cut]), max(high, ends[-1 - cut])
    if low > high:
        return None
    room = 0.06 * (high - low) or 0.1 * abs(low) or 1.0
    return low - room, high + room


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "report needs matplotlib, which is not installed. Run: pip install 'rap-lightning[report]'"
        ) from error


def draw(chart: Chart, names: list[str], salt: str) -> tuple[str, bytes]:
    """Draw a chart; the same values give the same bytes. ``salt`` is that of the ids in the SVG.

    Returns:
        The SVG, readable on a light and on a dark background, and a PNG on white.
    """
    from matplotlib import figure as mpl_figure
    from matplotlib import style

    options = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9, "axes.titlesize": 10,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#80808050",
        "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 5, "errorbar.capsize": 2,
    }  # fmt: skip
    with style.context(["default", options]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        legend_rows = math.ceil(sum(line.style == "marked" for line in chart.drawn) / 2)
        figure = mpl_figure.Figure(figsize=(3.9, 2.7 + 0.19 * legend_rows), layout="constrained")
        _plot(figure, chart, names)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        figure.set_layout_engine("none")  # the layout is done, and takes a third of the time
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub("</style>", f"{_PAGE_STYLE}</style>", svg.getvalue(), count=1), png.getvalue()


def _plot(figure: Any, chart: Chart, names: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    axes = figure.add_subplot()
    if chart.diagonal is not None:
        axes.plot(chart.diagonal, chart.diagonal, color="#808080", linestyle="dashed", linewidth=1)
    if chart.level is not None:
        axes.axhline(chart.level, color="#808080", linewidth=1)
    legend: dict[str, tuple[Line, Any]] = {}
    places = [x for line in chart.drawn for x, _ in line.points]
    step = min(0.008, 0.04 / len(chart.runs)) * (max(places) - min(places)) if places else 0.0
    for line in chart.drawn:
        if line.style == "marked":  # moved a little, so that the intervals of several runs don't overlap
            aside = step * (chart.runs.index(line.run) - (len(chart.runs) - 1) / 2)
            hollow = any(other.run == line.run for other, _ in legend.values())
            legend[line.name(names)] = line, _draw_marked(axes, line, aside, hollow)
        else:
            thin: dict[str, Any] = {"alpha": 0.5} if line.style == "thin" else {"linestyle": "dotted"}
            xs, ys = [x for x, _ in line.points], [y.value for _, y in line.points]
            axes.plot(xs, ys, color=COLOURS[line.run % len(COLOURS)], linewidth=1, **thin)
    if legend:
        handles, labels = [handle for _, handle in legend.values()], [_shortened(name) for name in legend]
        figure.legend(handles, labels, loc="outside lower left", ncols=min(2, len(handles)))
    axes.set(title="\n".join(wrap(clean(chart.title), 40)[:2]), xlabel=chart.x, ylabel=chart.y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.x == "step", steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if chart.limits is not None:
        axes.set_ylim(*chart.limits)
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _draw_marked(axes: Any, line: Line, aside: float, hollow: bool) -> Any:
    """Draw a line with markers and intervals; return what the legend shows of it."""
    figures = [y for _, y in line.points]
    # A value may lie outside its interval (a percentile bootstrap of a biased statistic): then that side has no bar.
    down = [max(0.0, (y.value or 0.0) - y.low) if y.low is not None else 0.0 for y in figures]
    up = [max(0.0, y.high - (y.value or 0.0)) if y.high is not None else 0.0 for y in figures]
    return axes.errorbar(
        [x + aside for x, _ in line.points], [y.value for y in figures], yerr=[down, up] if any(down + up) else None,
        color=COLOURS[line.run % len(COLOURS)], elinewidth=1, marker=MARKERS[line.run % len(MARKERS)],
        markevery=max(1, len(figures) // 8), linestyle=DASHES[line.run // len(COLOURS) % len(DASHES)],
        **({"markerfacecolor": "none"} if hollow else {}),
    )  # fmt: skip


def _shortened(name: str, longest: int = 30) -> str:
    """Cut the middle of a long name."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
