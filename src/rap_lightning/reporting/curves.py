"""metrics.csv, whole or cut off in the middle of a line, as curves."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_HALF = "(?:/(?:chosen-goal|rejected-goal|unconditioned))?"
TERM = re.compile(rf"(?:val/)?loss/(.+?){_HALF}")
"""A term that the loss itself reports: its name, without the origin. The loss by origin looks like one."""
WANTED = re.compile(
    rf"(?:val/)?(?:loss|rewards/margins|rewards/accuracies){_HALF}|{TERM.pattern}"
    r"|(pairs|tokens)_per_second|steering/goal-.+"
)
STEERING = "steering/goal-"
SHOWN = 240
"""Points of a curve that are drawn; of longer ones, means of neighbours."""


@dataclass
class Curves:
    """What was logged, by name.

    Attributes:
        values: name -> (step, value) in order of steps; of a step logged twice (a resumed run) the later value.
        not_finite: name -> the first step at which it was no number or infinite. Such values are not in ``values``.
        broken: lines that can't be read, such as the last one of a run that was killed while it was written.
        last_step: the highest step in the file.
    """

    values: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    broken: int = 0
    last_step: int = 0

    def last(self, name: str) -> float | None:
        """The last value of a curve; None where there is none."""
        points = self.values.get(name)
        return points[-1][1] if points else None

    def steering(self) -> list[tuple[float, float]]:
        """(goal, mean score) after training, where the run printed a SteeringTable."""
        found = []
        for name in self.values:
            if name.startswith(STEERING) and (goal := as_number(name.removeprefix(STEERING))) is not None:
                found.append((goal, self.values[name][-1][1]))
        return sorted(found)


def read_curves(path: Path) -> Curves:
    """Read metrics.csv as Lightning's CSVLogger writes it: a column per name, blank where a step has no such value."""
    curves, latest = Curves(), dict[str, dict[int, float]]()
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = _rows(line.replace("\0", "") for line in file)
        header = next(rows, None) or []
        if "step" not in header:
            return curves
        at_step = header.index("step")
        wanted = [(place, name) for place, name in enumerate(header) if WANTED.fullmatch(name)]
        for row in rows:
            step = as_number(row[at_step]) if len(row) == len(header) else None
            if step is None:
                curves.broken += 1
                continue
            curves.last_step = max(curves.last_step, int(step))
            for place, name in wanted:
                if not row[place]:
                    continue
                value = as_number(row[place])
                if value is not None:
                    latest.setdefault(name, {})[int(step)] = value
                else:
                    curves.not_finite.setdefault(name, int(step))
                    latest.setdefault(name, {}).pop(int(step), None)
    curves.values = {name: sorted(points.items()) for name, points in sorted(latest.items()) if points}
    return curves


def joined(earlier: list[tuple[Curves, int]], last: Curves) -> Curves:
    """The curves of a run in several sessions.

    Args:
        earlier: of each session but the last, in order: its curves, and the step at which the next went on. What it
            logged beyond that led to nothing, and is left out.
        last: of the last one. Of a step that two sessions logged, the later value stands.
    """
    whole = Curves(broken=last.broken + sum(curves.broken for curves, _ in earlier), last_step=last.last_step)
    points: dict[str, dict[int, float]] = {}
    for curves, end in [*earlier, (last, None)]:
        for name, found in curves.values.items():
            points.setdefault(name, {}).update((step, value) for step, value in found if end is None or step <= end)
        for name, step in curves.not_finite.items():
            if end is None or step <= end:
                whole.not_finite.setdefault(name, step)
        if end is not None:
            whole.last_step = max(whole.last_step, min(end, curves.last_step))
    whole.values = {name: sorted(found.items()) for name, found in sorted(points.items()) if found}
    return whole


def thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values of a curve, at most SHOWN of them: means of as many neighbours as that takes."""
    each = math.ceil(len(points) / SHOWN) if points else 1
    parts = [points[first : first + each] for first in range(0, len(points), each)]
    return [part[-1][0] for part in parts], [math.fsum(v for _, v in part) / len(part) for part in parts]


def as_number(text: object) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _rows(lines: Iterator[str]) -> Iterator[list[str]]:
    reader = csv.reader(lines)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield []
