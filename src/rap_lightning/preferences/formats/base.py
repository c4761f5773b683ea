"""What every row format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rap_lightning.preferences.pairs import BadRow, Judged, is_blank, read_number, read_text, shown

Row = dict[str, Any]
SHOWN = 160  # characters of a row that an adapter could not take


class RowFormat(ABC):
    """Reads rows of one shape.

    Args:
        attributes: names of further rewards that each response must have, as the goal template asks for them.
        scored: responses must have rewards; without, the pairs can only be trained on without goals.
    """

    name: ClassVar[str]
    expects: ClassVar[str]
    """The columns, for messages."""
    paired: ClassVar[bool] = False
    """Rows are pairs already, so nothing is selected."""

    def __init__(self, attributes: Sequence[str] = (), scored: bool = True) -> None:
        self.attributes, self.scored = tuple(attributes), scored

    @classmethod
    @abstractmethod
    def fits(cls, columns: set[str]) -> bool:
        """Whether rows with these columns are of this format."""

    id_type: type = str
    """What prompt ids are, where there are any."""
    blind: bool = False
    """Scores are not looked at, whatever stands there: a judge's take their place."""

    def look(self, rows: Sequence[Row]) -> None:
        """Learn from the first rows what must hold for all."""
        self.id_type = next((type(r["prompt_id"]) for r in rows if r.get("prompt_id") is not None), str)

    def group_key(self, row: Row) -> Any:
        """Neighbouring rows with the same key belong together; None where each row stands alone."""
        return None

    @abstractmethod
    def read(self, rows: Sequence[Row]) -> Judged:
        """The conversation of a row, or of the rows of a group, and its responses.

        Raises:
            BadRow: nothing of it can be used.
        """

    # -- shared by formats -----------------------------------------------------------------------------------------

    def prompt(self, row: Row, column: str) -> str:
        """A prompt that is one text."""
        text = read_text(row.get(column), column)
        if is_blank(text):
            raise BadRow(column, "an empty prompt", text)
        return text

    def reward(self, value: Any, column: str) -> float:
        """A score; nan where scores are not looked at."""
        return float("nan") if self.blind else read_number(value, column)

    def wanted(self, scores: Any, column: str) -> tuple[float, ...]:
        """The further rewards that the goal template asks for, in its order."""
        if not self.attributes:
            return ()
        if not isinstance(scores, Mapping):
            raise BadRow(column, "no object with a score for each attribute", scores)
        return tuple(read_number(scores.get(name), f"{column}.{name}") for name in self.attributes)


class Adapted(RowFormat):
    """Rows that a user's own function turns into rows of a known format.

    Args:
        adapt: takes a row, and returns one of a known format; or None to leave the row out.
        inner: the known format.
    """

    name = "your adapter"
    expects = "whatever your adapter reads"

    def __init__(self, adapt: Callable[[Row], Row | None], inner: RowFormat) -> None:
        super().__init__(inner.attributes, inner.scored)
        self.adapt, self.inner = adapt, inner
        self.paired = inner.paired  # type: ignore[misc]

    @classmethod
    def fits(cls, columns: set[str]) -> bool:
        """Never found by columns: it is named."""
        return False

    def read(self, rows: Sequence[Row]) -> Judged:
        """Adapt, then read."""
        self.inner.blind = self.blind
        adapted = call_adapter(self.adapt, rows[0])
        if adapted is None:
            raise BadRow("row", "left out by your adapter", by_choice=True)
        return self.inner.read([adapted])


def call_adapter(adapt: Callable[[Row], Row | None], row: Row) -> Row | None:
    """The adapted row; whatever the function raises is the row's fault, and said."""
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
