"""An engine and judges whose figures are known beforehand."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.engines.base import Completion, Request
from rap_lightning.onpolicy.model_source import ModelSource


class Obedient(Engine):
    """Responds with the goal that it is asked for."""

    def open(self, model: ModelSource, rank: int) -> None:
        pass

    def run(self, requests: Sequence[Request], generation: Any, wanted: Collection[str]) -> Iterator[list[Completion]]:
        for request in requests:
            if request.id in wanted:
                yield [Completion(request.id, request.goal or "5", 4 + request.sample)]


def face_value(prompt: str, response: str) -> float:
    """The number that stands there."""
    return float(response)


def by_letters(prompt: str, response: str) -> float:
    """1 to 10, by a digest of the text."""
    return 1 + sum(map(ord, response)) % 19 / 2


def never(prompt: str, response: str) -> float:
    """Raises where the response has an even number of letters."""
    if len(response) % 2 == 0:
        raise ValueError("an even number")
    return 3.0
