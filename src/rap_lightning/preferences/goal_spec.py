"""A goal's text as words around numbers, so that others than Python can write it: a chat template, say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.scales import printed


@dataclass(frozen=True)
class Number:
    """One number that a goal states.

    Attributes:
        name: what a mapping of numbers calls it.
        low, high: its range; best: what is asked for where nothing is said.
        decimals: it is printed with at most this many.
    """

    name: str
    low: float
    high: float
    decimals: int
    best: float


@dataclass(frozen=True)
class Wording:
    """``parts[0]``, the first number, ``parts[1]``, the second number, ...

    Attributes:
        parts: the words, one more than there are numbers.
        numbers: in the order in which they are stated.
        alone: the name of the number that a goal given as a single number sets; None where there is none.
    """

    parts: tuple[str, ...]
    numbers: tuple[Number, ...]
    alone: str | None

    def __post_init__(self) -> None:
        names = [number.name for number in self.numbers]
        if len(self.parts) != len(names) + 1 or len(set(names)) != len(names):
            raise ConfigError(f"a goal's wording needs words around numbers of different names, found {names}")

    def text(self, values: Mapping[str, float]) -> str:
        """The goal's text; a number that ``values`` leaves out is the best."""
        text = self.parts[0]
        for number, after in zip(self.numbers, self.parts[1:], strict=True):
            text += printed(values.get(number.name, number.best), number.decimals) + after
        return text

    @staticmethod
    def best(number: Number) -> str:
        """A number's best, as it is printed."""
        return printed(number.best, number.decimals)

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"parts": list(self.parts), "numbers": [asdict(n) for n in self.numbers], "alone": self.alone}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Wording:
        """The inverse of :meth:`record`."""
        numbers = tuple(Number(**number) for number in record["numbers"])
        return cls(tuple(record["parts"]), numbers, record["alone"])

    def grid(self, points: int = 201) -> Sequence[dict[str, float]]:
        """Values over the whole range of every number, to compare two ways of writing with."""
        rows = []
        for i in range(points):
            # each number runs through its range at another pace, so that none can stand in another's place
            shares = [(i * (place + 1) % points) / (points - 1) for place in range(len(self.numbers))]
            numbers = zip(self.numbers, shares, strict=True)
            rows.append({n.name: n.low + share * (n.high - n.low) for n, share in numbers})
        return rows
