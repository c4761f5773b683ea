"""Draws panels with matplotlib: as SVG whose colours are the page's, and as PNG for slides."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.reporting.panels import Panel, Picture, Series
from rap_lightning.reporting.text import clean, short

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "*")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))
COLOURS = ("#1b61c9", "#b8500a", "#17774a", "#a8327a", "#6747c2", "#0b7285", "#85560f", "#525c69")
"""On white; a page in the dark has its own. With 8 of them, 12 markers and 3 dashes, 24 runs look different."""

WIDTH, HEIGHT = 3.9, 2.7  # inches of a panel; on a phone's width its text is still 11 px high
CROWD = 6  # runs in one panel; more are drawn finer
STEPS = [1, 2, 2.5, 5, 10]  # of ticks
TITLE = 46
"""Characters of a panel's title that fit on one line of a PNG."""


@dataclass(frozen=True)
class Ink:
    """Colours of what is drawn."""

    text: str
    quiet: str
    grid: str
    ground: str
    runs: tuple[str, ...]

    def run(self, index: int) -> str:
        """A run's colour."""
        return self.runs[index % len(self.runs)]


PAPER = Ink("#1c2430", "#5b6675", "#e3e7ec", "#ffffff", COLOURS)
_NAMED = Ink("#000001", "#000002", "#000003", "#000004", tuple(f"#0000{16 + i:02x}" for i in range(len(COLOURS))))
"""Stand-ins in an SVG, which become the page's CSS variables."""

_VARIABLES = {_NAMED.text: "--ink", _NAMED.quiet: "--quiet", _NAMED.grid: "--rule", _NAMED.ground: "--ground"} | {
    colour: f"--run-{i}" for i, colour in enumerate(_NAMED.runs)
}


def require_matplotlib() -> None:
    """Raise ConfigError, which says what to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "report draws with matplotlib, which isn't installed here. Install it: pip install 'rap-lightning[report]'"
        ) from error


def svg(panel: Panel, name: str, limits: tuple[float, float] | None) -> str:
    """A panel as an SVG element with the page's colours and font, and ids of its own.

    Args:
        panel: what to draw.
        name: makes ids unique in the page.
        limits: of y, where the panels of a picture share it.
    """
    from matplotlib.figure import Figure

    with _style(_NAMED, salt=name):
        figure = Figure(figsize=(WIDTH, _height(panel)))
        axes = figure.add_axes(_place(panel))
        _draw(axes, panel, _NAMED, limits)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#0000[0-9a-f]{2}", _variable, text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening, text, count=1)


def _variable(found: re.Match[str]) -> str:
    name = _VARIABLES.get(found[0])
    return found[0] if name is None else f"var({name})"  # a run may be called #0000ff


def _opening(found: re.Match[str]) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{found[1]}" aria-hidden="true" focusable="false">'
    )


def png(picture: Picture, names: list[str]) -> bytes:
    """A picture with its title, its sentence and its legend, on white, at twice a page's size."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    titles = [wrap(clean(panel.title), TITLE)[:2] for panel in picture.panels]
    drawn = max(map(_height, picture.panels))
    tall = drawn + 0.2 * max(map(len, titles)) + 0.15
    top, bottom = 0.55, 0.2 + 0.22 * math.ceil(len(picture.runs) / 3)
    width, height = WIDTH * max(columns, 1.5), rows * tall + top + bottom
    with _style(PAPER, salt=picture.name):
        figure = Figure(figsize=(width, height))
        figure.text(0.12 / width, 1 - 0.35 / height, picture.title, weight="bold", size=12)
        for i, panel in enumerate(picture.panels):
            across = (width - columns * WIDTH) / 2 + i % columns * WIDTH
            up = height - top - (i // columns + 1) * tall
            left, low, wide, high = _place(panel)
            place = (across + left * WIDTH) / width, (up + low * drawn) / height
            axes = figure.add_axes((*place, wide * WIDTH / width, high * drawn / height))
            _draw(axes, panel, PAPER, limits(picture, panel))
            figure.text((across + 0.12) / width, (up + drawn + 0.02) / height, "\n".join(titles[i]), weight="bold",
                        va="bottom")  # fmt: skip
        handles = [
            Line2D([], [], color=PAPER.run(i), marker=_marker(i), linestyle=_dash(i), label=short(names[i], 40))
            for i in picture.runs
        ]
        figure.legend(handles=handles, loc="lower center", ncols=min(3, len(handles)), frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


def marker(run: int) -> tuple[str, str]:
    """The path of a run's marker in a box from -1 to 1, for the legend, and its line's dashes."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.path import Path

    style = MarkerStyle(_marker(run))
    path = style.get_path().transformed(style.get_transform())
    drawn = []
    for points, code in path.iter_segments(curves=True, simplify=False):
        numbers = " ".join(f"{2 * value * (-1 if i % 2 else 1):.3f}" for i, value in enumerate(points))
        drawn.append({Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}.get(code, "Z") + (
            "" if code == Path.CLOSEPOLY else numbers))  # fmt: skip
    dash = _dash(run)
    return "".join(drawn), "" if dash == "solid" else " ".join(str(2 * part) for part in dash[1])


def limits(picture: Picture, panel: Panel) -> tuple[float, float] | None:
    """Ends of the value axis: the panel's own, or those of all panels where the picture shares them."""
    if panel.limits is not None or not picture.shared or panel.by_run:
        return panel.limits
    values = [end for one in picture.panels for series in one.series for end in _span(series)]
    values += [level for one in picture.panels for level, _ in one.levels]
    if not values:
        return None
    low, high = min(values), max(values)
    named = any(series.named for one in picture.panels for series in one.series)  # which takes a line of text
    room = (0.18 if named else 0.06) * (high - low) or abs(low) * 0.1 or 1.0
    return low - room, high + room


def _span(series: Series) -> tuple[float, ...]:
    """Lowest and highest value, intervals included; of dense lines without the odd spike, which would flatten all."""
    ends = sorted(series.ends)
    cut = len(ends) // 100 if series.style == "bare" else 0
    return (ends[cut], ends[-1 - cut]) if ends else ()


def _place(panel: Panel) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes within a panel."""
    if panel.by_run:
        height = _height(panel)
        return 0.36, 0.5 / height, 0.6, (height - 0.75) / height
    return 0.12, 0.19, 0.85, 0.68


def _height(panel: Panel) -> float:
    """Inches; of dots beneath each other, as many as there are runs."""
    return 0.95 + 0.32 * len(panel.series) if panel.by_run else HEIGHT


def _draw(axes: Any, panel: Panel, ink: Ink, ends: tuple[float, float] | None) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if panel.by_run:
        _dots(axes, panel, ink, ends)
    else:
        _lines(axes, panel, ink, ends)
        axes.text(0, 1.04, panel.axis, transform=axes.transAxes, color=ink.quiet, ha="left", va="bottom")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=panel.whole))
        if panel.whole:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if panel.percent:
        (axes.xaxis if panel.by_run else axes.yaxis).set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(panel.x, loc="right")
    axes.grid(axis="x" if panel.by_run else "y")
    axes.set_axisbelow(True)


def _lines(axes: Any, panel: Panel, ink: Ink, ends: tuple[float, float] | None) -> None:
    if panel.identity is not None:
        low, high = panel.identity
        axes.plot([low, high], [low, high], color=ink.quiet, linestyle=(0, (4, 3)), linewidth=1)
    shown = panel.runs
    crowded = len(shown) > CROWD
    spread = max((x for one in panel.series for x in one.x), default=0) - min(
        (x for one in panel.series for x in one.x), default=0
    )
    for one in panel.series:
        points = one.points
        if not points:
            continue
        colour, xs = ink.run(one.run), [x for x, _ in points]
        ys = [y.value for _, y in points]
        if one.style == "bare":
            axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.55)
            continue
        if one.style == "level":
            axes.plot(xs, ys, color=colour, linewidth=1.2, linestyle=(0, (1, 1.6)))
            continue
        step = min(0.008, 0.04 / len(shown)) * spread  # intervals stand beside each other
        aside = (shown.index(one.run) - (len(shown) - 1) / 2) * step
        every = max(1, len(points) // 8)
        errors = [[_reach(y.value, y.low) for _, y in points], [_reach(y.high, y.value) for _, y in points]]
        finer: dict[str, Any] = {"elinewidth": 0.8, "linewidth": 1.2, "markersize": 4} if crowded else {"capsize": 2}
        axes.errorbar(
            [x + aside for x in xs], ys, yerr=errors if any(map(any, errors)) else None, color=colour,
            marker=_marker(one.run), markevery=every, linestyle=_dash(one.run),
            markeredgecolor=ink.ground, markeredgewidth=0.6, **({"elinewidth": 1} | finer),
        )  # fmt: skip
        if one.named:
            below = any((other.points[-1][1].value or 0) > (ys[-1] or 0) for other in panel.series if other.points)
            axes.annotate(one.what, (xs[-1], ys[-1]), (0, -7 if below else 7), textcoords="offset points", size=8,
                          color=ink.text, ha="right", va="top" if below else "bottom")  # fmt: skip
    if ends is not None:
        axes.set_ylim(*ends)
    for level, _ in panel.levels:
        axes.axhline(level, color=ink.quiet, linewidth=1, zorder=1)


def _dots(axes: Any, panel: Panel, ink: Ink, ends: tuple[float, float] | None) -> None:
    for one in panel.series:
        if not one.points:
            continue
        place, figure = one.points[0]
        errors = [[_reach(figure.value, figure.low)], [_reach(figure.high, figure.value)]]
        axes.errorbar([figure.value], [place], xerr=errors, color=ink.run(one.run), capsize=2, elinewidth=1.4,
                      marker=_marker(one.run), markersize=7, linestyle="none")  # fmt: skip
    names = [short(clean(one.what), 17) for one in panel.series]
    axes.set_yticks([one.x[0] for one in panel.series], names)
    axes.set_ylim(max(one.x[0] for one in panel.series) + 0.6, -0.6)
    axes.tick_params(axis="y", labelcolor=ink.text)
    for level, name in panel.levels:
        axes.axvline(level, color=ink.quiet, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(name, (level, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      color=ink.quiet, ha="center", va="bottom", size=8)  # fmt: skip
    if ends is not None:
        axes.set_xlim(*ends)


def _reach(high: float | None, low: float | None) -> float:
    return max(0.0, high - low) if high is not None and low is not None else 0.0


def _marker(run: int) -> str:
    return MARKERS[run % len(MARKERS)]


def _dash(run: int) -> Any:
    return DASHES[run // len(COLOURS) % len(DASHES)]


@contextmanager
def _style(ink: Ink, salt: str) -> Iterator[None]:
    from matplotlib import style

    options = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9,
        "font.family": "DejaVu Sans", "text.color": ink.text, "axes.labelcolor": ink.quiet,
        "axes.edgecolor": ink.quiet, "axes.linewidth": 0.8, "axes.facecolor": "none", "axes.spines.top": False,
        "axes.spines.right": False, "figure.facecolor": ink.ground, "savefig.facecolor": ink.ground,
        "savefig.edgecolor": "none", "xtick.color": ink.quiet, "ytick.color": ink.quiet, "xtick.major.size": 3,
        "ytick.major.size": 0, "grid.color": ink.grid, "grid.linewidth": 0.8, "lines.linewidth": 1.7,
        "lines.markersize": 6, "axes.unicode_minus": True, "path.simplify": True,
    }  # fmt: skip
    with style.context(["default", options]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield
