"""The base class of row formats, and the format of a user's adapter function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from rap_lightning.preferences.formats.context_columns import CONTEXT_COLUMNS, with_context
from rap_lightning.preferences.pairs import (
    FIELDS,
    REASONING,
    TOOL_FIELDS,
    BadRow,
    Judged,
    read_number,
    read_weight,
    shown,
)

Row = dict[str, Any]
Adapter = Callable[[Row], Row | None]
MESSAGES = frozenset({"prompt", "chosen", "rejected", "conversations"})
READ = FIELDS.union(REASONING, {"from", "value"})
SHOWN = 160  # characters of a row for which an adapter failed


class RowFormat(ABC):
    """Read rows of one shape.

    Args:
        attributes: names of further rewards that each response must have, as in the goal template.
        scored: responses must have rewards. Unscored pairs can only be trained on without goals.
        blind: ignore scores, because a judge's rewards replace them.
        weight_column: the column that holds the weight of a row's pairs; None weighs all pairs alike.
    """

    name: ClassVar[str]
    expects: ClassVar[str]
    """The columns, for messages."""
    columns: ClassVar[tuple[set[str], ...]]
    """Rows that have all columns of one of these sets are of this format."""
    reads: ClassVar[frozenset[str]]
    """All columns that are read, apart from those of attributes and of context."""
    grouped: ClassVar[bool] = False
    """Neighbouring rows with the same :meth:`group_key` are read together."""
    paired: bool = False
    """Rows are already pairs, so nothing is selected."""
    id_type: type = str
    """The type of prompt ids."""

    def __init__(
        self, attributes: Sequence[str] = (), scored: bool = True, blind: bool = False, weight_column: str | None = None
    ) -> None:
        self.attributes, self.scored, self.blind = tuple(attributes), scored, blind
        self.weight_column = weight_column
        side_scores = ("scores_chosen", "scores_rejected") if attributes and self.paired else self.attributes
        self._known = self.reads.union(CONTEXT_COLUMNS, side_scores, {weight_column} - {None})

    def look(self, rows: Sequence[Row]) -> None:
        """Learn from the first rows what must be the same in all."""
        self.id_type = next((type(r["prompt_id"]) for r in rows if r.get("prompt_id") is not None), str)

    def group_key(self, row: Row) -> Any:
        """Return what neighbouring rows of a group have in common."""
        raise NotImplementedError

    def read_row(self, rows: Sequence[Row]) -> Judged:
        """Return what :meth:`read` does, with the weight, the system text and the earlier turns of further columns.

        Raises:
            BadRow: nothing of it can be used.
        """
        judged = self.read(rows)
        if self.weight_column is not None:
            judged = replace(judged, weight=self._weight([row.get(self.weight_column) for row in rows]))
        if not any(name in rows[0] for name in CONTEXT_COLUMNS):
            return judged
        return replace(judged, history=tuple(with_context(judged.history, rows[0])))

    def unread(self, row: Row) -> Collection[str]:
        """Return the columns of a row, and the fields of its messages, that have no effect."""
        unread = set(row.keys() - self._known)
        for name in MESSAGES & row.keys():
            turns = row[name] if isinstance(row[name], list) else [row[name]]
            for turn in turns:
                if isinstance(turn, dict) and len(turn) > 2:
                    read = READ | TOOL_FIELDS if turn.get("role") == "tool" or turn.get("tool_calls") else READ
                    unread |= {f"{name}[].{key}" for key in turn.keys() - read if turn[key] is not None}
        return unread

    @abstractmethod
    def read(self, rows: Sequence[Row]) -> Judged:
        """Return the conversation of a row, or of the rows of a group, and its responses.

        Raises:
            BadRow: nothing of it can be used.
        """

    def _weight(self, values: Sequence[Any]) -> float:
        column = str(self.weight_column)
        first, *others = [read_weight(value, column) for value in values]
        if any(other != first for other in others):
            raise BadRow(column, "weights that differ between the rows of one prompt")
        return first

    # -- shared by formats -----------------------------------------------------------------------------------------

    def reward(self, value: Any, column: str) -> float:
        """Return a score; nan if scores are ignored."""
        return float("nan") if self.blind else read_number(value, column)

    def wanted(self, scores: Any, column: str) -> tuple[float, ...]:
        """Return the further rewards that the goal template states, in its order."""
        if not self.attributes:
            return ()
        if not isinstance(scores, Mapping):
            raise BadRow(column, "no object with a score for each attribute", scores)
        return tuple(read_number(scores.get(name), f"{column}.{name}") for name in self.attributes)


class Adapted(RowFormat):
    """Rows that a user's function converts into rows of a known format."""

    name = "your adapter"
    reads = frozenset()

    def __init__(self, adapt: Adapter, inner: RowFormat) -> None:
        super().__init__(inner.attributes, inner.scored, inner.blind, inner.weight_column)
        self.adapt, self.inner = adapt, inner
        self.paired, self.id_type = inner.paired, inner.id_type

    def unread(self, row: Row) -> Collection[str]:
        return ()  # only the function knows

    def read_row(self, rows: Sequence[Row]) -> Judged:
        return self.read(rows)  # the columns of context are those that the function returns

    def read(self, rows: Sequence[Row]) -> Judged:
        adapted = call_adapter(self.adapt, rows[0])
        if adapted is None:
            raise BadRow("row", "left out by your adapter", by_choice=True)
        return self.inner.read_row([adapted])


def call_adapter(adapt: Adapter, row: Row) -> Row | None:
    """Return the adapted row; raise BadRow with the row for any exception of the function."""
    try:
        adapted = adapt(dict(row))
    except BadRow:
        raise
    except Exception as error:
        problem = BadRow("row", f"your adapter raised {type(error).__name__}: {error}", stops=True)
        problem.found = shown(row, SHOWN)
        raise problem from error
    if adapted is not None and not isinstance(adapted, dict):
        raise BadRow("row", f"your adapter returned a {type(adapted).__name__}, not a row (a dict)", stops=True)
    return adapted
