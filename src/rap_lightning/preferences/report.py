"""The counted report: every row read is kept, repaired or dropped, with its reason and where it stood."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.preferences.pairs import BadRow

KINDS = {
    "faults": "fault",
    "dropped": "dropped",
    "left_out": "left out (single responses)",
    "repaired": "repaired",
    "noted": "noted",
    "truncated": "truncated",
}


@dataclass
class Tally:
    """How often one thing happened, and where it happened first."""

    count: int = 0
    first: str = ""
    number: float = field(default=math.inf, compare=False)

    def add(self, where: str, count: int = 1, number: float = math.inf) -> None:
        """Count more; remember the place if it is the first, by its number within the part of the data at hand."""
        self.count += count
        if not self.first or number < self.number:
            self.first, self.number = where, number


@dataclass
class DataReport:
    """What became of the rows of one split.

    Attributes:
        read: rows read; kept: rows that at least one pair was made of; pairs: scored pairs; relabelled: training pairs
            made of them.
        faults, dropped, left_out, repaired, noted, truncated: reason in words -> tally. A fault stops a run; dropped
            counts rows and pairs, left_out single responses of rows with several.
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
    row: str = field(default="", compare=False)
    number: float = field(default=math.inf, compare=False)
    """The row that is being looked at, and its number, so that the first of a kind is known in any order."""

    def note(self, kind: str, reason: str, place: str, column: str, found: str = "") -> None:
        """Count ``reason`` in ``kind`` (the name of one of this report's dicts) at a place and column."""
        number = self.number if place == self.row else math.inf
        self.tallies(kind).setdefault(reason, Tally()).add(at(place, column, found), 1, number)

    def problem(self, kind: str, problem: BadRow, place: str) -> None:
        """Count what made a row or a response bad."""
        self.note(kind, problem.reason, place, problem.column, problem.found)

    def tallies(self, kind: str) -> dict[str, Tally]:
        """One of the dicts by its name."""
        tallies: dict[str, Tally] = getattr(self, kind)
        return tallies

    def add(self, other: DataReport) -> None:
        """Add a later part of the same split."""
        for name in ("read", "kept", "pairs", "relabelled"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind in KINDS:
            mine = self.tallies(kind)
            for reason, tally in other.tallies(kind).items():
                mine.setdefault(reason, Tally()).add(tally.first, tally.count)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kinds = {
            kind: {reason: {"count": t.count, "first": t.first} for reason, t in self.tallies(kind).items()}
            for kind in KINDS
        }
        return {
            "source": self.source,
            "split": self.split,
            "rows_read": self.read,
            "rows_kept": self.kept,
            "pairs_kept": self.pairs,
            "relabelled_pairs": self.relabelled,
            **kinds,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """The inverse of :meth:`as_dict`."""
        report = cls(values["source"], values["split"], values["rows_read"], values["rows_kept"])
        report.pairs, report.relabelled = values["pairs_kept"], values["relabelled_pairs"]
        for kind in KINDS:
            report.tallies(kind).update({r: Tally(t["count"], t["first"]) for r, t in values[kind].items()})
        return report

    def lines(self) -> Iterable[str]:
        """The report for people, a line each."""
        rows = f"{self.read:,} rows read, "
        if self.kept != self.pairs:
            rows += f"{self.kept:,} kept, "
        yield (
            f"{self.split}: {rows}{self.pairs:,} pairs kept, "
            f"{self.relabelled:,} training pairs after relabelling  [{self.source}]"
        )
        for kind, word in KINDS.items():
            for reason, tally in sorted(self.tallies(kind).items(), key=lambda item: -item[1].count):
                yield f"  {word} {tally.count:,}: {reason} (first: {tally.first})"


def at(place: str, column: str, found: str = "") -> str:
    """A place for people: file, line, column, and what stands there."""
    parts = [place, f"column {column}" if column else "", f"found {found}" if found else ""]
    return ", ".join(part for part in parts if part)
