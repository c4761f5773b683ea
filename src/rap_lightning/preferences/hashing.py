"""64-bit digests of texts, conversations and pairs, one by one or a column at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

PRIME = 0x100000001B3  # of the FNV hash
MASK = 2**64 - 1
ROLE = {
    "system": 0x9E3779B97F4A7C15,
    "user": 0xC2B2AE3D27D4EB4F,
    "assistant": 0x165667B19E3779F9,
    "tool": 0x85EBCA77C2B2AE63,
}
"""Odd numbers, one for each role."""


def hash_text(text: str) -> int:
    """Of one text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_turns(turns: Sequence[Mapping[str, Any]]) -> int:
    """Of a conversation, roles and order included."""
    value = 0
    for turn in turns:
        own = hash_text(turn["content"]) * ROLE[turn["role"]]
        if len(turn) > 2:
            own += hash_text(repr(sorted((k, v) for k, v in turn.items() if k not in ("role", "content"))))
        value = (value * PRIME + own) & MASK
    return value


def hash_pair(turns: int, first: int, second: int) -> int:
    """Of a conversation and two responses, in this order."""
    return ((turns * PRIME + first) * PRIME + second) & MASK


def hash_unordered(turns: int, first: int, second: int) -> int:
    """The same, whatever the order of the responses."""
    return ((turns * PRIME * PRIME) + first + second) & MASK


def hash_column(texts: Any) -> Hashes:
    """Of each text of an Arrow string array without nulls, as :func:`hash_text`."""
    import pyarrow as pa

    if len(texts) == 0:
        return np.zeros(0, dtype=np.uint64)
    texts = texts.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    raw = memoryview(data) if data is not None else memoryview(b"")
    parts = [blake2b(raw[a:b], digest_size=8).digest() for a, b in pairwise(ends)]
    return np.frombuffer(b"".join(parts), dtype="<u8").astype(np.uint64)


def hash_columns_of_turns(contents: Hashes, roles: NDArray[np.uint64], starts: Any, lengths: Any) -> Hashes:
    """Of conversations whose turns stand one after another, as :func:`hash_turns`.

    Args:
        contents: [turns] digests of the contents.
        roles: [turns] the number of each role.
        starts, lengths: [n] where each conversation begins, and how many turns it has.
    """
    own = contents * roles
    value = np.zeros(len(starts), dtype=np.uint64)
    for place in range(int(lengths.max(initial=0))):
        here = lengths > place
        value[here] = value[here] * np.uint64(PRIME) + own[starts[here] + place]
    return value
