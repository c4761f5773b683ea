"""JSON of others, whose nesting is limited: deep values end copying, printing and pickling in a RecursionError."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

DEEPEST = 100
"""Levels; the JSON schema of a tool has about ten."""


class TooDeep(ValueError):
    """JSON that is nested deeper than :data:`DEEPEST` levels."""

    def __init__(self) -> None:
        super().__init__(f"JSON nested deeper than {DEEPEST} levels")


def load_json(text: str | bytes, load: Callable[[Any], Any] = json.loads) -> Any:
    """Return the value of a JSON text, which ``load`` parses.

    Raises:
        TooDeep: it is nested too deeply.
        ValueError: it is not JSON.
    """
    try:
        value = load(text)
    except RecursionError:
        raise TooDeep from None
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opened > DEEPEST and _is_deep(value):
        raise TooDeep
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for one in level if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]  # fmt: skip
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)
