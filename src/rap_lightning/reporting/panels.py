"""What a picture shows, as plain values: drawn by figures.py, told by tables and alternative texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rap_lightning.reporting.evaluation import Estimate
from rap_lightning.reporting.text import number

Style = Literal["marked", "bare", "level"]
"""``marked`` has the run's marker at each point; ``bare`` is a thin line behind it, for what is dense."""

TABLED = 9
"""Points of a line that its table gives."""


@dataclass(frozen=True)
class Series:
    """A line of one run: points with intervals.

    ``what`` tells lines of one run apart, and ``named`` writes it at the line's end.
    """

    run: int
    x: Sequence[float]
    y: Sequence[Estimate]
    style: Style = "marked"
    what: str = ""
    named: bool = False

    @property
    def ends(self) -> list[float]:
        """All values, and the ends of their intervals."""
        return [end for _, y in self.points for end in (y.value, y.low, y.high) if end is not None]

    @property
    def points(self) -> list[tuple[float, Estimate]]:
        """Those that have a value."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y.value is not None]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what sets it apart from the panels beside it.
        x, y: names of the axes; y's stands above it.
        series: lines.
        identity: ends of the diagonal where the score equals the goal.
        levels: (value, name) of horizontal lines to compare with.
        percent: whether y is a share.
        by_run: x is a value and y the run's place: dots beneath each other, for single figures per run.
        limits: of y (of x where by_run); taken from the values otherwise.
        whole: whether x counts steps.
    """

    title: str
    x: str
    y: str
    series: list[Series]
    identity: tuple[float, float] | None = None
    levels: tuple[tuple[float, str], ...] = ()
    percent: bool = False
    by_run: bool = False
    limits: tuple[float, float] | None = None
    whole: bool = False

    @property
    def runs(self) -> list[int]:
        """The runs that it shows."""
        return sorted({one.run for one in self.series if one.points})

    @property
    def axis(self) -> str:
        """What stands above y: its name, and what the lines to compare with are, which would be in the way inside."""
        lines = ["dashed: score = goal"] if self.identity is not None else []
        return "; ".join([self.y, *lines, *(f"line at {number(at, self.percent)}: {name}" for at, name in self.levels)])

    def alt(self, names: list[str]) -> str:
        """The picture in words, for those who don't see it."""
        told = [self._told(one, names[one.run]) for one in self.series if one.points and one.style != "bare"]
        kind = f"Dots with intervals: {self.y}" if self.by_run else f"Line chart, {self.y} against {self.x}"
        return f"{kind} ({self.title}). " + " ".join(told)

    def _told(self, one: Series, name: str) -> str:
        points = one.points
        if self.by_run:
            return f"{name}: {estimate(points[0][1], self.percent)}."
        few = [points[i] for i in sorted({0, len(points) // 2, len(points) - 1})]
        values = ", ".join(f"{number(y.value, self.percent)} at {number(x)}" for x, y in few)
        return f"{name}{', ' + one.what if one.what else ''}: {values}."


@dataclass(frozen=True)
class Picture:
    """Panels that are read together, with the one sentence that says what to look for.

    Attributes:
        name: of its file.
        title, look, key: heading; what to look for; how lines are told apart, where the legend doesn't say it.
        shared: whether the panels have one y axis in common.
        stats: a small table beside the picture: head and rows.
        missing: (run, what it lacks, the command that makes it) where some runs are not in it.
    """

    name: str
    title: str
    look: str
    panels: list[Panel]
    key: str = ""
    shared: bool = True
    stats: tuple[list[str], list[list[str]]] | None = None
    missing: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def runs(self) -> list[int]:
        """The runs that it shows."""
        return sorted({run for panel in self.panels for run in panel.runs})

    def tables(self, names: list[str]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """The numbers behind it: a title, a head and rows for each panel."""
        for panel in self.panels:
            series = [one for one in panel.series if one.points]
            if panel.by_run:
                rows = [[names[one.run], estimate(one.points[0][1], panel.percent)] for one in series]
                yield panel.title, ["run", panel.x], rows
                continue
            dense = [one for one in series if one.style == "bare"]
            level = [one for one in series if one.style == "level"]
            for part in (dense, [one for one in series if one.style == "marked"]):
                if not part:
                    continue
                places = _some(sorted({x for one in part for x, _ in one.points}))
                columns = [{x: estimate(y, panel.percent) for x, y in one.points} for one in part]
                head = [panel.x, *(names[one.run] for one in part)]
                what = f"{panel.title}, {part[0].what}" if part[0].what else panel.title
                yield what, head, [[number(x), *(column.get(x, "") for column in columns)] for x in places]
            if level:
                rows = [[names[one.run], estimate(one.points[0][1], panel.percent)] for one in level]
                yield f"{panel.title}, {level[0].what}", ["run", panel.y], rows


def estimate(figure: Estimate, percent: bool = False) -> str:
    """``6.75 (6.4 to 7.1)``, or why there is none."""
    if figure.value is None:
        return f"– ({figure.why})" if figure.why else "–"
    value = number(figure.value, percent)
    if figure.low is None:
        return value
    return f"{value} ({number(figure.low, percent)}\u00a0to\u00a0{number(figure.high, percent)})"


def _some(values: list[float]) -> list[float]:
    """At most TABLED of them, evenly, the last included."""
    if len(values) <= TABLED:
        return values
    return [values[round(i * (len(values) - 1) / (TABLED - 1))] for i in range(TABLED)]
