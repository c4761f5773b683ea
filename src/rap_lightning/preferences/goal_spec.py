"""A goal's text as words around numbers, so that a chat template can write it without Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.scales import printed


@dataclass(frozen=True)
class Number:
    """One number that a goal states."""

    name: str
    low: float
    high: float
    decimals: int
    best: float


@dataclass(frozen=True)
class Wording:
    """The text ``parts[0]``, first number, ``parts[1]``, second number, ...

    Attributes:
        parts: the words, one more than there are numbers.
        numbers: in the order in which they are stated.
        alone: the number that is set by a goal given as a single number; None: a mapping is required.
    """

    parts: tuple[str, ...]
    numbers: tuple[Number, ...]
    alone: str | None

    def __post_init__(self) -> None:
        names = [number.name for number in self.numbers]
        if len(self.parts) != len(names) + 1 or len(set(names)) != len(names):
            raise ConfigError(
                f"a goal's wording needs one more part than numbers, and numbers with different names; found {names}"
            )

    def text(self, values: Mapping[str, float]) -> str:
        """Return the goal's text; a number that is not in ``values`` has its best value."""
        text = self.parts[0]
        for number, after in zip(self.numbers, self.parts[1:], strict=True):
            text += printed(values.get(number.name, number.best), number.decimals) + after
        return text

    @staticmethod
    def best(number: Number) -> str:
        return printed(number.best, number.decimals)

    def record(self) -> dict[str, Any]:
        return {"parts": list(self.parts), "numbers": [asdict(n) for n in self.numbers], "alone": self.alone}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Wording:
        numbers = tuple(Number(**number) for number in record["numbers"])
        return cls(tuple(record["parts"]), numbers, record["alone"])

    def grid(self, points: int = 201) -> Sequence[dict[str, float]]:
        """Return values over the whole range of every number, to compare two implementations of the text."""
        rows = []
        for i in range(points):
            # each number has its own period, so that swapped numbers are noticed
            shares = [(i * (place + 1) % points) / (points - 1) for place in range(len(self.numbers))]
            numbers = zip(self.numbers, shares, strict=True)
            rows.append({n.name: n.low + share * (n.high - n.low) for n, share in numbers})
        return rows
