"""Which numbers were seen before, at sixteen bytes each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.uint64]


class Seen:
    """A dictionary from 64-bit keys to 64-bit values that keeps the first value of each key.

    Sorted arrays of doubling sizes instead of a dict, which would take six times the memory.
    """

    def __init__(self) -> None:
        self._levels: list[tuple[Ints, Ints]] = []

    def add(self, keys: Ints, values: Ints) -> tuple[NDArray[np.bool_], Ints]:
        """Add keys with their values.

        Args:
            keys, values: [n] uint64; keys may repeat.

        Returns:
            For each key whether it was there before, also earlier in ``keys``, and the value it was there with.
        """
        known = np.zeros(len(keys), dtype=bool)
        first = values.copy()
        for level_keys, level_values in self._levels:
            place = np.searchsorted(level_keys, keys)
            place[place == len(level_keys)] = 0
            found = level_keys[place] == keys
            known |= found
            first[found] = level_values[place[found]]
        fresh = np.flatnonzero(~known)
        unique, index, inverse = np.unique(keys[fresh], return_index=True, return_inverse=True)
        earlier = fresh[index[inverse]]  # np.unique gives the first place of each
        repeated = earlier != fresh
        known[fresh[repeated]] = True
        first[fresh[repeated]] = values[earlier[repeated]]
        if len(unique):
            self._push(unique, values[fresh[index]])
        return known, first

    def _push(self, keys: Ints, values: Ints) -> None:
        while self._levels and len(self._levels[-1][0]) <= 2 * len(keys):
            other_keys, other_values = self._levels.pop()
            keys, values = np.concatenate([other_keys, keys]), np.concatenate([other_values, values])
            order = np.argsort(keys, kind="stable")
            keys, values = keys[order], values[order]
        self._levels.append((keys, values))
