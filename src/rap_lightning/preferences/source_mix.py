"""Streams of several sources with weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.hashing import hash_text
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source


def copies(pair_id: str, weight: float, seed: int) -> int:
    """Return how often a pair is used in an epoch: with weight 2.5 twice, and a seeded half of the pairs a third time.

    It depends on the pair's content and the seed only.
    """
    whole = int(weight)
    part = weight - whole
    if part <= 0:
        return whole
    return whole + (hash_text(f"{seed} {pair_id}") / 2**64 < part)


def stream_mixed(sources: Sequence[Source], split: str, rules: Rules, report: DataReport, seed: int) -> Iterator[Pair]:
    """Yield the pairs of several streams in turns, each pair as often as the weight of its source says."""
    streams = [
        weighted(read_pairs(source, split, rules, report, streaming=True, progress=False), source.weight, seed)
        for source in sources
    ]
    while streams:
        for stream in list(streams):
            pair = next(stream, None)
            if pair is None:
                streams.remove(stream)
            else:
                yield pair


def weighted(pairs: Iterable[Pair], weight: float, seed: int) -> Iterator[Pair]:
    """Yield each pair as often as a weight says."""
    for pair in pairs:
        for _ in range(copies(pair.id, weight, seed)):
            yield pair
