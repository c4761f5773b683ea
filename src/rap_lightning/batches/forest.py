"""Sequences that begin alike, as a forest in which what they share stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from rap_lightning.batches.types import Forest

Ids: TypeAlias = npt.NDArray[np.int64]

WORTH_SHARING = 16
"""Tokens. A sequence that would share fewer than these beyond an earlier branch starts at that branch: a further one
costs kernel calls in every layer, and saves next to nothing."""


@dataclass(frozen=True)
class Planted:
    """A forest over T tokens.

    Attributes:
        ids, positions: [T] int64.
        forest: what sees what.
        places: for each sequence, in the order given, where its tokens stand, int64.
    """

    ids: Ids
    positions: Ids
    forest: Forest
    places: list[Ids]


def plant(sequences: Sequence[Ids], *, shared: bool) -> Planted:
    """Lay sequences out depth first, sharing common beginnings, or each as a tree of its own."""
    # in lexicographic order neighbours share most, and a depth-first walk meets them side by side
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist()) if shared else range(len(sequences))
    end = np.empty(sum(map(len, sequences)), np.int64)
    ids, positions, places = np.empty_like(end), np.empty_like(end), [end] * len(sequences)
    paths: list[Ids] = []
    branches = [0]  # depths on the current path at which an earlier sequence left it
    path, previous, count = end[:0], end[:0], 0
    for index in order:
        sequence = sequences[index]
        common = _shared_length(previous, sequence) if shared else 0
        while branches[-1] > common:
            branches.pop()
        if common - branches[-1] < WORTH_SHARING and common < len(sequence):
            common = branches[-1]
        end[path[common:]] = count
        if common < len(path):
            paths.append(path)
            branches.append(common)
        new = slice(count, count + len(sequence) - common)
        ids[new], positions[new] = sequence[common:], np.arange(common, len(sequence))
        path = places[index] = np.concatenate([path[:common], np.arange(new.start, new.stop)])
        count, previous = new.stop, sequence
    end[path] = count
    paths.append(path)
    ids, positions, end = ids[:count], positions[:count], end[:count]
    starts = [0, *(np.flatnonzero(np.diff(end)) + 1).tolist()]
    runs = tuple((a, b, int(end[a])) for a, b in zip(starts, [*starts[1:], count], strict=True))
    forest = Forest(torch.from_numpy(end), runs, tuple(_spans(path) for path in paths))
    return Planted(ids, positions, forest, places)


def _shared_length(a: Ids, b: Ids) -> int:
    width = min(len(a), len(b))
    differs = np.flatnonzero(a[:width] != b[:width])
    return int(differs[0]) if len(differs) else width


def _spans(path: Ids) -> tuple[tuple[int, int], ...]:
    jumps = np.flatnonzero(np.diff(path) != 1)
    starts, stops = [0, *(jumps + 1)], [*jumps, len(path) - 1]
    return tuple((int(path[a]), int(path[b]) + 1) for a, b in zip(starts, stops, strict=True))
