"""Digests: 64 bits of texts, conversations and pairs, and digests of user code for cache keys.

Pair ids, duplicate detection, seeded choices and the rewards of a judge all use the content digests, so they do not
depend on the order of rows or on the number of processes. Changing one changes every pair id and every cache key.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRIME = 0x100000001B3  # of the FNV hash
MASK = 2**64 - 1
ROLE = {
    "system": 0x9E3779B97F4A7C15,
    "user": 0xC2B2AE3D27D4EB4F,
    "assistant": 0x165667B19E3779F9,
    "tool": 0x85EBCA77C2B2AE63,
}
"""An odd multiplier for each role."""


def hash_text(text: str) -> int:
    """Return the digest of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_turns(turns: Sequence[Mapping[str, Any]]) -> int:
    """Return the digest of a conversation, which depends on roles and order."""
    value = 0
    for turn in turns:
        own = hash_text(turn["content"]) * ROLE[turn["role"]]
        if len(turn) > 2:  # tool calls and their ids
            own += hash_text(repr(sorted((k, v) for k, v in turn.items() if k not in ("role", "content"))))
        value = (value * PRIME + own) & MASK
    return value


def hash_pair(turns: int, first: int, second: int) -> int:
    """Return the digest of a conversation and two responses in this order, from their digests."""
    return ((turns * PRIME + first) * PRIME + second) & MASK


def hash_unordered(turns: int, first: int, second: int) -> int:
    """Return the digest of a conversation and two responses in either order, from their digests."""
    return ((turns * PRIME * PRIME) + first + second) & MASK


def hash_code(thing: Any) -> str:
    """Return the import path of a class or function, and digests of the files that define it and its bases."""
    if not isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__} {_file_digest(thing)}"
    digests = [_file_digest(base) for base in thing.__mro__ if base is not object]
    return f"{thing.__module__}.{thing.__qualname__} {' '.join(dict.fromkeys(digests))}"


def describe_object(thing: Any) -> str:
    """Return the code and the attributes of an object, for cache keys."""
    arguments = ", ".join(f"{name}={_described(value)}" for name, value in sorted(vars(thing).items()))
    return f"{hash_code(type(thing))} ({arguments})"


def _described(value: Any) -> str:
    """Return a value without its address in memory, which differs between processes."""
    text = repr(value)
    return describe_object(value) if text == object.__repr__(value) and hasattr(value, "__dict__") else text


def _file_digest(thing: Any) -> str:
    try:
        path = inspect.getsourcefile(thing)
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if path else ""
    except (OSError, TypeError):  # defined in a console, or built in
        return ""
