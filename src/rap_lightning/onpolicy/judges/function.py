"""Judge by a Python function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rap_lightning.preferences.hashing import hash_code
from rap_lightning.preferences.judge import Item, Judge, Verdict, declared

CHUNK = 256
"""Verdicts that are written to disk at a time."""


class Function(Judge):
    """A function of (prompt, response), by import path.

    It returns the reward, or an object of rewards by name with ``overall_score`` among them. The prompt is the last
    user turn; a function with a parameter ``history`` gets the whole conversation in it.

    Args:
        function: import path, for example rap_lightning.world.rule.score.
        scale: lowest and highest reward, if the function has limits: [1, 10].
    """

    def __init__(self, function: Callable[[str, str], Any], scale: list[float] | None = None) -> None:
        super().__init__()
        self.function, self.scale = function, declared(scale)
        try:
            self._takes_history = "history" in inspect.signature(function).parameters
        except (TypeError, ValueError):
            self._takes_history = False

    def settings(self) -> dict[str, Any]:
        """Return the function with the digest of its code."""
        return {"class": "Function", "function": hash_code(self.function), "scale": self.scale}

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """Yield verdicts in the order of the items."""
        for first in range(0, len(items), CHUNK):
            yield [self._verdict(item) for item in items[first : first + CHUNK]]

    def _verdict(self, item: Item) -> Verdict:
        prompt = next(turn["content"] for turn in reversed(item.history) if turn["role"] == "user")
        options = {"history": [dict(turn) for turn in item.history]} if self._takes_history else {}
        try:
            found = self.function(prompt, item.response, **options)
        except Exception as error:  # whatever the user's code raises is the verdict on this response
            return Verdict(item.id, error=f"the function raised {type(error).__name__}: {error}")
        rewards = dict(found) if isinstance(found, dict) else {"overall_score": found}
        for name, value in rewards.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return Verdict(item.id, error=f"the function returned {value!r} as {name}, not a finite number")
        if "overall_score" not in rewards:
            return Verdict(item.id, error="the function returned no overall_score")
        overall = float(rewards.pop("overall_score"))
        return Verdict(item.id, overall, {name: float(value) for name, value in rewards.items()})
