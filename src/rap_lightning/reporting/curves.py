"""metrics.csv as curves, also where the file was cut off in the middle of a line."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rap_lightning.reporting.text import as_number

STEERING = "steering/goal-"
POINTS = 240
"""Points of a curve that are drawn. Longer curves are averaged over neighbouring steps."""


@dataclass
class Curves:
    """The logged metrics.

    Attributes:
        values: name -> (step, value), by step. Of a step that was logged twice (a resumed run) the later value counts.
        not_finite: name -> first step at which it was nan or infinite; such values are not in ``values``.
        broken: lines that can't be read, such as the last line of a run that was killed while writing.
        last_step: the highest step in the file.
    """

    values: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    broken: int = 0
    last_step: int = 0

    def last(self, name: str) -> float | None:
        """Return the last value of a metric; None if it was never logged."""
        points = self.values.get(name)
        return points[-1][1] if points else None

    def steering(self) -> list[tuple[float, float]]:
        """Return (goal, mean score) after training, as the SteeringTable callback logged it."""
        goals = {name: as_number(name.removeprefix(STEERING)) for name in self.values if name.startswith(STEERING)}
        return sorted((goal, self.values[name][-1][1]) for name, goal in goals.items() if goal is not None)


def read_curves(path: Path) -> Curves:
    """Read metrics.csv as Lightning's CSVLogger writes it: a column per metric, blank where a step has no value."""
    curves, latest = Curves(), dict[str, dict[int, float]]()
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = _rows(line.replace("\0", "") for line in file)
        header = next(rows, [])
        if "step" not in header:
            return curves
        at_step = header.index("step")
        for row in rows:
            step = as_number(row[at_step]) if len(row) == len(header) else None
            if step is None:
                curves.broken += 1
                continue
            curves.last_step = max(curves.last_step, int(step))
            for name, text in zip(header, row, strict=True):
                if not text or name == "step":
                    continue
                value = as_number(text)
                if value is not None:
                    latest.setdefault(name, {})[int(step)] = value
                else:
                    curves.not_finite.setdefault(name, int(step))
                    latest.setdefault(name, {}).pop(int(step), None)
    curves.values = {name: sorted(points.items()) for name, points in sorted(latest.items()) if points}
    return curves


def joined(earlier: list[tuple[Curves, int]], last: Curves) -> Curves:
    """Join the curves of a run that was resumed.

    Args:
        earlier: the curves of each session but the last, in order, each with the step of the checkpoint from which the
            next session resumed. Steps beyond it were repeated, so they are left out.
        last: the curves of the last session.
    """
    whole = Curves(broken=last.broken + sum(curves.broken for curves, _ in earlier), last_step=last.last_step)
    points: dict[str, dict[int, float]] = {}
    for curves, end in [*earlier, (last, math.inf)]:
        for name, found in curves.values.items():
            points.setdefault(name, {}).update((step, value) for step, value in found if step <= end)
        for name, step in curves.not_finite.items():
            if step <= end:
                whole.not_finite.setdefault(name, step)
        whole.last_step = max(whole.last_step, int(min(end, curves.last_step)))
    whole.values = {name: sorted(found.items()) for name, found in sorted(points.items()) if found}
    return whole


def thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Return steps and values of a curve, at most POINTS of them: means over neighbouring steps."""
    each = math.ceil(len(points) / POINTS) or 1
    parts = [points[first : first + each] for first in range(0, len(points), each)]
    return [part[-1][0] for part in parts], [math.fsum(v for _, v in part) / len(part) for part in parts]


def _rows(lines: Iterator[str]) -> Iterator[list[str]]:
    reader = csv.reader(lines)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield []
