"""The counted report: what happened to every row that was read, with the reason and the first place.

:class:`DataReport` is the only counter of rows. Reading and encoding call :meth:`DataReport.note`; processes return
reports of their part, which are added up in order. :func:`write_rows` writes every noted row to a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rap_lightning.atomic_write import atomic_file
from rap_lightning.preferences.pairs import BadRow, Pair

KINDS = {
    "faults": "fault",
    "dropped": "dropped",
    "left_out": "left out (single responses)",
    "repaired": "repaired",
    "noted": "noted",
    "truncated": "truncated",
}
"""The dicts of a report, and how its lines call them."""

Span = tuple[float, float]
"""Lowest and highest."""


@dataclass
class Tally:
    """How often one thing happened, and where it happened first."""

    count: int = 0
    first: str = ""
    span: Span | None = None
    remedy: str = ""

    def add(self, other: Tally) -> None:
        self.count += other.count
        self.first = self.first or other.first
        self.span = merge_spans(self.span, other.span)
        self.remedy = other.remedy or self.remedy

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"count": self.count, "first": self.first}
        if self.span is not None:
            found |= {"lowest": self.span[0], "highest": self.span[1]}
        return found | ({"remedy": self.remedy} if self.remedy else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        span = (values["lowest"], values["highest"]) if "lowest" in values else None
        return cls(values["count"], values["first"], span, values.get("remedy", ""))

    @property
    def range_text(self) -> str:
        if self.span is None:
            return ""
        low, high = self.span
        return f", from {low:g} to {high:g}" if low < high else f", {low:g} each time"


@dataclass(frozen=True)
class Weights:
    """The weights of pairs: how many, the lowest and highest, their sum and the sum of their squares."""

    count: int
    lowest: float
    highest: float
    total: float
    squares: float

    @classmethod
    def of(cls, weight: float) -> Weights:
        return cls(1, weight, weight, weight, weight * weight)

    def plus(self, other: Weights | None) -> Weights:
        if other is None:
            return self
        low, high = min(self.lowest, other.lowest), max(self.highest, other.highest)
        total, squares = self.total + other.total, self.squares + other.squares
        return Weights(self.count + other.count, low, high, total, squares)

    def __str__(self) -> str:
        return (
            f"weights of pairs: from {self.lowest:g} to {self.highest:g}, mean {self.total / self.count:.4g}; they "
            f"average as {self.total**2 / self.squares:,.0f} pairs of equal weight would"
        )


@dataclass
class DataReport:
    """What happened to the rows of one split.

    Attributes:
        read: rows read; kept: rows that gave at least one pair; pairs: scored pairs; relabelled: training pairs made of
            them.
        faults, dropped, left_out, repaired, noted, truncated: reason -> tally. A fault stops a run; dropped counts rows
            and pairs, left_out single responses of rows with several.
        rewards: lowest and highest reward of the pairs; None where there are none.
        weights: of the pairs, as their column says; None where none does.
        unread: columns of the source that are not read.
        names: our column name -> its name in the source, for renamed columns.
        rows: if it is a list, everything noted is also appended to it, one entry per row.
    """

    source: str
    split: str
    read: int = 0
    kept: int = 0
    pairs: int = 0
    relabelled: int = 0
    faults: dict[str, Tally] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)
    left_out: dict[str, Tally] = field(default_factory=dict)
    repaired: dict[str, Tally] = field(default_factory=dict)
    noted: dict[str, Tally] = field(default_factory=dict)
    truncated: dict[str, Tally] = field(default_factory=dict)
    rewards: Span | None = None
    weights: Weights | None = None
    unread: set[str] = field(default_factory=set)
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    rows: list[dict[str, Any]] | None = field(default=None, compare=False)

    def note(
        self, kind: str, reason: str, place: str, column: str, found: str = "", span: Span | None = None,
        remedy: str = "",
    ) -> None:  # fmt: skip
        """Count a reason.

        Args:
            kind: the name of one of this report's dicts.
            reason: in words, the same for every row with this fault.
            place: file and line or row.
            column: of the row, by our name.
            found: a short excerpt of the value.
            span, remedy: as in :class:`Tally`.
        """
        column = self._with_source_names(column)
        tally = Tally(1, describe_place(place, column, found), span, remedy)
        self.tallies(kind).setdefault(reason, Tally()).add(tally)
        if self.rows is not None:
            where = re.fullmatch(r"(?s)(.*) (line|row) (\d+)", place)
            parts = {"file": where[1], where[2]: int(where[3])} if where else {"file": place}
            what = "fault" if kind == "faults" else kind
            self.rows.append({"what": what, "reason": reason, **parts, "column": column, "found": found})

    def note_bad_row(self, kind: str, problem: BadRow, place: str) -> None:
        remedy = problem.remedy if kind == "faults" else ""
        self.note(kind, problem.reason, place, problem.column, problem.found, problem.span, remedy)

    def count_pair(self, pair: Pair, relabelled: int, weighted: bool = False) -> None:
        self.pairs += 1
        if weighted:
            self.weights = Weights.of(pair.weight).plus(self.weights)
        self.relabelled += relabelled
        high, low = pair.rewards
        if low <= high:  # nan is no reward
            self.rewards = merge_spans(self.rewards, (low, high))

    def tallies(self, kind: str) -> dict[str, Tally]:
        tallies: dict[str, Tally] = getattr(self, kind)
        return tallies

    def add(self, other: DataReport) -> None:
        self.read += other.read
        self.kept += other.kept
        self.pairs += other.pairs
        self.relabelled += other.relabelled
        for kind in KINDS:
            for reason, tally in other.tallies(kind).items():
                self.tallies(kind).setdefault(reason, Tally()).add(tally)
        self.rewards = merge_spans(self.rewards, other.rewards)
        if other.weights is not None:
            self.weights = other.weights.plus(self.weights)
        self.unread |= other.unread
        if self.rows is not None:
            self.rows += other.rows or []

    def as_dict(self) -> dict[str, Any]:
        kinds = {kind: {reason: t.as_dict() for reason, t in self.tallies(kind).items()} for kind in KINDS}
        return {
            "source": self.source,
            "split": self.split,
            "rows_read": self.read,
            "rows_kept": self.kept,
            "pairs_kept": self.pairs,
            "relabelled_pairs": self.relabelled,
            "rewards": None if self.rewards is None else list(self.rewards),
            "columns_not_read": sorted(self.unread),
            "weights": None if self.weights is None else asdict(self.weights),
            **kinds,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        report = cls(values["source"], values["split"], values["rows_read"], values["rows_kept"])
        report.pairs, report.relabelled = values["pairs_kept"], values["relabelled_pairs"]
        report.rewards = tuple(values["rewards"]) if values["rewards"] else None
        report.unread = set(values["columns_not_read"])
        report.weights = Weights(**found) if (found := values["weights"]) else None
        for kind in KINDS:
            report.tallies(kind).update({reason: Tally.from_dict(t) for reason, t in values[kind].items()})
        return report

    def lines(self) -> Iterable[str]:
        """Yield the lines of the printed report, the most frequent reason of each kind first."""
        rows = f"{self.read:,} rows read, "
        if self.kept != self.pairs:
            rows += f"{self.kept:,} kept, "
        yield (
            f"{self.split}: {rows}{self.pairs:,} pairs kept, "
            f"{self.relabelled:,} training pairs after relabelling  [{self.source}]"
        )
        for kind, word in KINDS.items():
            for reason, tally in sorted(self.tallies(kind).items(), key=lambda item: -item[1].count):
                yield f"  {word} {tally.count:,}: {reason}{tally.range_text} (first: {tally.first})"
        if self.weights is not None:
            yield f"  {self.weights}"
        if self.unread:
            yield f"  note: columns that are not read: {', '.join(ascii(name)[1:-1] for name in sorted(self.unread))}"
        for remedy in self.remedies():
            yield f"  {remedy}"

    def remedies(self) -> list[str]:
        return list(dict.fromkeys(tally.remedy for tally in self.faults.values() if tally.remedy))

    def _with_source_names(self, column: str) -> str:
        """Name columns as they are called here and, where they were renamed, in the source."""
        if not self.names:
            return column
        parts = column.split(", ")
        for i, part in enumerate(parts):
            if theirs := self.names.get(re.split(r"[\[. ]", part, maxsplit=1)[0]):
                parts[i] = f"{part} ({theirs} in the file)"
        return ", ".join(parts)


def describe_place(place: str, column: str, found: str = "") -> str:
    """Return a place for messages: file, line, column, and the value found there."""
    parts = [place, f"column {column}" if column not in ("", "row") else "", f"found {found}" if found else ""]
    return ", ".join(part for part in parts if part)


def merge_spans(one: Span | None, other: Span | None) -> Span | None:
    """Return the smallest range that contains both."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def write_rows(path: Path, reports: Iterable[DataReport]) -> int:
    """Write the rows that reports noted as JSON lines; return their number. The file appears once it is complete."""
    count = 0
    with atomic_file(path, errors="backslashreplace") as file:
        for report in reports:
            of = {"source": report.source, "split": report.split}
            rows = report.rows or []
            file.writelines(json.dumps(of | row, ensure_ascii=False) + "\n" for row in rows)
            count += len(rows)
    return count
