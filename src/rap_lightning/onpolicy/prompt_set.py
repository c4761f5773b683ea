"""Conversations to generate for, from files of several formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.errors import DataError
from rap_lightning.preferences.formats.context_columns import with_context
from rap_lightning.preferences.formats.scored_pairs import as_turns, tools_of
from rap_lightning.preferences.pairs import BadRow, Message, carrying, read_messages, split_response
from rap_lightning.preferences.sources import Source, chunks_of, splits_of

COLUMNS = ("messages", "chosen", "prompt", "instruction", "question")
FORMS = "a prompt or instruction (text or messages), messages, or chosen (messages)"


@dataclass
class PromptSet:
    """Distinct conversations in order of the file, with counts of what was done to the rows."""

    histories: list[list[Message]] = field(default_factory=list)
    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, place: str) -> None:
        """Count what was done to a row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        head = f"{self.read:,} rows read, {len(self.histories):,} prompts"
        return [head, *(f"  {n:,}: {reason} (first: {self.first[reason]})" for reason, n in self.counts.items())]


def rows_of(path: str, split: str | None) -> Iterator[tuple[dict[str, Any] | BadRow, str]]:
    """Yield each row of a split, by default ``train`` or else the first, with its place for messages."""
    source = Source(path)
    if split is None:
        splits = splits_of(source)
        split = "train" if "train" in splits else splits[0]
    for chunk in chunks_of(source, split):
        yield from ((row, chunk.place(number)) for number, row in chunk.rows())


def read_prompts(path: str, split: str | None = None, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Read the distinct conversations of a file, folder or Hub dataset.

    Args:
        path: rows with ``messages`` (a final answer is left out), ``chosen`` as messages, ``prompt``, ``instruction``
            or ``question``; training data works too.
        split: by default ``train``, or the only one.
        column: read this column instead.
        limit: at most this many conversations.
    """
    found, seen = PromptSet(), set()
    for row, place in rows_of(path, split):
        found.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            history = carrying(with_context(_history(row, column, found, place), row), tools_of(row))
        except BadRow as problem:
            if problem.stops:
                raise DataError(f"{place}, column {problem.column}: {problem.reason}.") from problem
            found.note(f"dropped: {problem.reason}", f"{place}, column {problem.column}")
            continue
        if (key := repr(history)) in seen:
            found.note("the same prompt again, used once", place)
            continue
        seen.add(key)
        found.histories.append(history)
        if limit is not None and len(found.histories) >= limit:
            return found
    if not found.histories:
        raise DataError("\n".join([f"{path}: no prompt that can be used.", *found.lines()]))
    return found


def _history(row: dict[str, Any], column: str | None, found: PromptSet, place: str) -> list[Message]:
    if column is not None:
        if column not in row:
            raise BadRow(column, f"no such column; there are {', '.join(row)}", stops=True)
        return as_turns(row[column])
    for name in COLUMNS:
        value = row.get(name)
        if value is None or (name == "chosen" and not isinstance(value, list)):  # chosen as text is the answer alone
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
