"""Rows with others that belong to the same prompt, and chunks that no such group straddles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rap_lightning.preferences.formats import RowFormat
from rap_lightning.preferences.formats.base import Row
from rap_lightning.preferences.pairs import BadRow
from rap_lightning.preferences.readers import Chunk
from rap_lightning.preferences.rules import Rules


@dataclass(frozen=True)
class Rows:
    """Rows that were taken apart already, with their numbers."""

    name: str
    unit: str
    numbered: list[tuple[int, Row | BadRow]]

    def place(self, number: int) -> str:
        """Where a row was read."""
        return f"{self.name} {self.unit} {number}"

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        """The rows, as a chunk gives them."""
        return iter(self.numbered)


def groups(chunk: Chunk | Rows, rules: Rules, row_format: RowFormat) -> Iterator[tuple[int, list[Row] | BadRow]]:
    """(number of the first, rows that belong together); a row of most formats stands alone."""
    group: list[Row] = []
    start, key = 0, None
    for number, row in chunk.rows():
        if isinstance(row, BadRow):
            yield number, row
            continue
        row = renamed(row, rules.columns)
        own = row_format.group_key(row)
        if own is None:
            yield number, [row]
            continue
        if group and own != key:
            yield start, group
            group = []
        if not group:
            start, key = number, own
        group.append(row)
    if group:
        yield start, group


def whole_groups(
    chunks: Iterable[Chunk], row_format: RowFormat, columns: dict[str, str] | None
) -> Iterator[Chunk | Rows]:
    """Chunks that no group of rows straddles."""
    held: list[tuple[int, Row | BadRow]] = []
    last: Chunk | None = None
    for chunk in chunks:
        if not grouping(row_format):
            yield chunk
            continue
        if last is not None and last.name != chunk.name and held:
            yield Rows(last.name, last.unit, held)
            held = []
        last = chunk
        held += [(n, row if isinstance(row, BadRow) else renamed(row, columns)) for n, row in chunk.rows()]
        keys = [None if isinstance(row, BadRow) else row_format.group_key(row) for _, row in held]
        cut = next((i for i in range(len(keys) - 1, 0, -1) if keys[i] != keys[i - 1]), 0)
        if cut:
            yield Rows(chunk.name, chunk.unit, held[:cut])
            held = held[cut:]
    if held and last is not None:
        yield Rows(last.name, last.unit, held)


def grouping(row_format: RowFormat) -> bool:
    """Whether rows of the format belong together at all."""
    return type(row_format).group_key is not RowFormat.group_key


def renamed(row: Row, columns: dict[str, str] | None) -> Row:
    """A row with our names for its columns, from {theirs: ours}."""
    return row if not columns else {columns.get(name, name): value for name, value in row.items()}
