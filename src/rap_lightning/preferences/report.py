"""The counted report: every row read is kept, repaired or dropped, with its reason and where it stood."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """How often one thing happened, and where it happened first."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Count one more; remember the place if it is the first."""
        self.count += 1
        self.first = self.first or where


@dataclass
class DataReport:
    """What became of the rows of one split.

    ``dropped``, ``repaired`` and ``truncated`` map a reason in words to its tally. ``pairs`` counts the rows kept and
    ``relabelled`` the goal-conditioned pairs made of them.
    """

    source: str
    split: str
    read: int = 0
    pairs: int = 0
    relabelled: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    repaired: dict[str, Tally] = field(default_factory=dict)
    truncated: dict[str, Tally] = field(default_factory=dict)

    def note(self, kind: dict[str, Tally], reason: str, row: int, column: str) -> None:
        """Count ``reason`` in ``kind`` (one of this report's dicts) at a row (from 1) and column."""
        kind.setdefault(reason, Tally()).add(f"row {row}, column {column}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kinds = {
            name: {reason: {"count": tally.count, "first": tally.first} for reason, tally in kind.items()}
            for name, kind in (("dropped", self.dropped), ("repaired", self.repaired), ("truncated", self.truncated))
        }
        return {
            "source": self.source,
            "split": self.split,
            "rows_read": self.read,
            "pairs_kept": self.pairs,
            "relabelled_pairs": self.relabelled,
            **kinds,
        }

    def lines(self) -> Iterable[str]:
        """The report for people, a line each."""
        yield (
            f"{self.split}: {self.read:,} rows read, {self.pairs:,} pairs kept, "
            f"{self.relabelled:,} training pairs after relabelling  [{self.source}]"
        )
        for name, kind in (("dropped", self.dropped), ("repaired", self.repaired), ("truncated", self.truncated)):
            for reason, tally in sorted(kind.items(), key=lambda item: -item[1].count):
                yield f"  {name} {tally.count:,}: {reason} (first: {tally.first})"
