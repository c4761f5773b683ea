"""The counted report: every row read is kept, repaired or dropped, with its reason and where it stood."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


Span = tuple[float, float]
"""Lowest and highest."""


@dataclass
class Tally:
    """How often one thing happened, and where it happened first.

    Attributes:
        span: the numbers that were found, where they are what is wrong.
        remedy: what can be done about it, where the words alone don't say.
    """

    count: int = 0
    first: str = ""
    number: float = field(default=math.inf, compare=False)
    span: Span | None = None
    remedy: str = ""

    def add(self, where: str, count: int = 1, number: float = math.inf) -> None:
        """Count more; remember the place if it is the first, by its number within the part of the data at hand."""
        self.count += count
        if not self.first or number < self.number:
            self.first, self.number = where, number

    def learn(self, span: Span | None, remedy: str) -> None:
        """Take in further numbers, and what can be done."""
        self.span, self.remedy = wider(self.span, span), remedy or self.remedy

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        more: dict[str, Any] = {} if self.span is None else {"lowest": self.span[0], "highest": self.span[1]}
        return {"count": self.count, "first": self.first, **more, **({"remedy": self.remedy} if self.remedy else {})}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        """The inverse of :meth:`as_dict`."""
        span = (values["lowest"], values["highest"]) if "lowest" in values else None
        return cls(values["count"], values["first"], span=span, remedy=values.get("remedy", ""))

    @property
    def found(self) -> str:
        """The numbers in words, after a comma."""
        if self.span is None:
            return ""
        low, high = self.span
        return f", from {low:g} to {high:g}" if low < high else f", {low:g} each time"


@dataclass
class DataReport:
    """What became of the rows of one split.

    Attributes:
        read: rows read; kept: rows that at least one pair was made of; pairs: scored pairs; relabelled: training pairs
            made of them.
        faults, dropped, left_out, repaired, noted, truncated: reason in words -> tally. A fault stops a run; dropped
            counts rows and pairs, left_out single responses of rows with several.
        rewards: lowest and highest reward of the pairs; None where there are none.
        names: what the source calls columns that were renamed, by our name.
        rows: where it is a list, all that is counted is also listed there, an entry a time with file, line or row,
            column and reason.
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
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    rows: list[dict[str, Any]] | None = field(default=None, compare=False)
    row: str = field(default="", compare=False)
    number: float = field(default=math.inf, compare=False)
    """The row that is being looked at, and its number, so that the first of a kind is known in any order."""

    def note(self, kind: str, reason: str, place: str, column: str, found: str = "") -> Tally:
        """Count ``reason`` in ``kind`` (the name of one of this report's dicts) at a place and column."""
        number = self.number if place == self.row else math.inf
        column = self.named(column)
        tally = self.tallies(kind).setdefault(reason, Tally())
        tally.add(at(place, column, found), 1, number)
        if self.rows is not None:
            self.rows.append(_entry(kind, reason, place, column, found))
        return tally

    def note_all(
        self, kind: str, reason: str, numbers: Sequence[int], place: Callable[[int], str], column: str
    ) -> None:
        """Count ``reason`` at the rows with these numbers, lowest first."""
        column = self.named(column)
        tally = self.tallies(kind).setdefault(reason, Tally())
        tally.add(at(place(numbers[0]), column), len(numbers), numbers[0])
        if self.rows is not None:
            self.rows += [_entry(kind, reason, place(number), column, "") for number in numbers]

    def problem(self, kind: str, problem: BadRow, place: str) -> None:
        """Count what made a row or a response bad."""
        remedy = problem.remedy if kind == "faults" else ""
        self.note(kind, problem.reason, place, problem.column, problem.found).learn(problem.span, remedy)

    def named(self, column: str) -> str:
        """A column, or several, as they are called here and, where they were renamed, in the source."""
        if not self.names:
            return column
        parts = column.split(", ")
        for i, part in enumerate(parts):
            if theirs := self.names.get(re.split(r"[\[. ]", part, maxsplit=1)[0]):
                parts[i] = f"{part} ({theirs} in the file)"
        return ", ".join(parts)

    def saw_rewards(self, lowest: float, highest: float) -> None:
        """Take in the rewards of pairs; nan is no reward."""
        if lowest <= highest:
            self.rewards = wider(self.rewards, (float(lowest), float(highest)))

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
                own = mine.setdefault(reason, Tally())
                own.add(tally.first, tally.count)
                own.learn(tally.span, tally.remedy)
        self.rewards = wider(self.rewards, other.rewards)
        if self.rows is not None:
            self.rows += other.rows or []

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kinds = {kind: {reason: t.as_dict() for reason, t in self.tallies(kind).items()} for kind in KINDS}
        return {
            "source": self.source,
            "split": self.split,
            "rows_read": self.read,
            "rows_kept": self.kept,
            "pairs_kept": self.pairs,
            "relabelled_pairs": self.relabelled,
            "rewards": None if self.rewards is None else list(self.rewards),
            **kinds,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """The inverse of :meth:`as_dict`."""
        report = cls(values["source"], values["split"], values["rows_read"], values["rows_kept"])
        report.pairs, report.relabelled = values["pairs_kept"], values["relabelled_pairs"]
        report.rewards = tuple(values["rewards"]) if values["rewards"] else None
        for kind in KINDS:
            report.tallies(kind).update({reason: Tally.from_dict(t) for reason, t in values[kind].items()})
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
                yield f"  {word} {tally.count:,}: {reason}{tally.found} (first: {tally.first})"
        for remedy in dict.fromkeys(tally.remedy for tally in self.faults.values() if tally.remedy):
            yield f"  {remedy}"


def at(place: str, column: str, found: str = "") -> str:
    """A place for people: file, line, column, and what stands there."""
    parts = [place, f"column {column}" if column not in ("", "row") else "", f"found {found}" if found else ""]
    return ", ".join(part for part in parts if part)


def wider(one: Span | None, other: Span | None) -> Span | None:
    """The range that holds both."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def _entry(kind: str, reason: str, place: str, column: str, found: str) -> dict[str, Any]:
    """What is listed of a row: its place taken apart."""
    where = re.fullmatch(r"(?s)(.*) (line|row) (\d+)", place)
    taken = {"file": where[1], where[2]: int(where[3])} if where else {"file": place}
    what = {"faults": "fault"}.get(kind, kind)
    return {"what": what, "reason": reason, **taken, "column": column, "found": found}
