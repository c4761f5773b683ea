"""Conversations to generate for, from files of many kinds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.errors import DataError
from rap_lightning.preferences.formats.scored_pairs import as_turns
from rap_lightning.preferences.pairs import BadRow, Message, read_messages, split_response
from rap_lightning.preferences.sources import Source, chunks_of, splits_of

COLUMNS = ("messages", "chosen", "prompt", "instruction", "question")
FORMS = "a prompt or instruction (text or messages), messages, or chosen (messages)"


@dataclass
class Prompts:
    """Distinct conversations, in order, and what became of the rows."""

    histories: list[list[Message]] = field(default_factory=list)
    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, place: str) -> None:
        """Count what was done to a row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def lines(self) -> list[str]:
        """For people."""
        head = f"{self.read:,} rows read, {len(self.histories):,} prompts"
        return [head, *(f"  {n:,}: {reason} (first: {self.first[reason]})" for reason, n in self.counts.items())]


def read_prompts(path: str, split: str | None = None, column: str | None = None, limit: int | None = None) -> Prompts:
    """The distinct conversations of a file, folder or Hub data set.

    Args:
        path: rows with ``messages`` (an answer at the end is left out), ``chosen`` as messages, ``prompt``,
            ``instruction`` or ``question``; data to train on serve too.
        split: by default ``train``, or the only one.
        column: which column to read instead.
        limit: at most this many.

    Raises:
        DataError: nothing there that can be read as prompts.
    """
    source = Source(path)
    available = splits_of(source)
    name = split or ("train" if "train" in available else available[0])
    found, seen = Prompts(), set()
    for chunk in chunks_of(source, name):
        for number, row in chunk.rows():
            found.read += 1
            place = chunk.place(number)
            try:
                if isinstance(row, BadRow):
                    raise row
                history = _history(row, column, found, place)
            except BadRow as problem:
                if problem.stops:
                    raise DataError(f"{place}, column {problem.column}: {problem.reason}.") from problem
                found.note(f"dropped: {problem.reason}", f"{place}, column {problem.column}")
                continue
            key = repr(history)
            if key in seen:
                found.note("the same prompt again, asked once", place)
                continue
            seen.add(key)
            found.histories.append(history)
            if limit is not None and len(found.histories) >= limit:
                return found
    if not found.histories:
        raise DataError("\n".join([f"{path}: no prompt that can be used.", *found.lines()]))
    return found


def _history(row: dict[str, Any], column: str | None, found: Prompts, place: str) -> list[Message]:
    if column is not None:
        if column not in row:
            raise BadRow(column, f"no such column; there are {', '.join(row)}", stops=True)
        return as_turns(row[column])
    for name in COLUMNS:
        value = row.get(name)
        if name == "chosen" and not isinstance(value, list):
            continue  # the answer alone
        if value is None:
            continue
        if name == "chosen":
            return split_response(read_messages(value, name), name)[0]
        if name == "messages":
            turns = read_messages(value, name)
            if turns[-1]["role"] == "assistant":
                found.note("noted: the answer at the end of messages left out", place)
                turns = turns[:-1]
            if not turns:
                raise BadRow(name, "nothing to answer")
            return turns
        return as_turns(value)
    raise BadRow(", ".join(COLUMNS), f"no prompt: expected {FORMS}", ", ".join(row), stops=True)
