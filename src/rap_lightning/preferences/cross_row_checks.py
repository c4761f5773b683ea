"""Checks across rows: repeated pairs, contradicting pairs, and prompt ids that two prompts share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.hashing import hash_text, hash_turns, hash_unordered
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.rows_to_pairs import LEAVE_OUT, ChunkPairs
from rap_lightning.preferences.rules import Rules

CONTRADICTION = "the same two responses to the same prompt, the other way round"
REPEAT = "a pair that was read before"
SHARED_ID = "a prompt_id that another prompt has as well"

UInts = NDArray[np.uint64]


class CrossRowChecks:
    """Check the pairs of each chunk against those of all earlier chunks of a split.

    Args:
        rules: what to do with repeats and bad rows.
        report: of the split; gets the counts.
    """

    def __init__(self, rules: Rules, report: DataReport) -> None:
        self.rules, self.report = rules, report
        self.seen_pairs, self.seen_ids = FirstSeen(), FirstSeen()

    def keep(self, part: ChunkPairs) -> list[Pair]:
        """Return the pairs to keep, and count the others."""
        shared = self._shared_ids(part)
        pairs = [pair for pair in part.pairs if pair.place not in shared]
        unordered = [hash_unordered(hash_turns(pair.history), *map(hash_text, pair.responses)) for pair in pairs]
        ids = _uints([int(pair.id, 16) for pair in pairs])
        known, first = self.seen_pairs.add(_uints(unordered), ids)
        kept = []
        for pair, is_known, same in zip(pairs, known, first == ids, strict=True):
            if not is_known:
                kept.append(pair)
            elif not same:
                self._note_bad(CONTRADICTION, pair.place, "chosen, rejected")
            elif self.rules.filters.repeats == "drop":
                self.report.note("dropped", REPEAT, pair.place, "chosen, rejected")
            else:
                self.report.note("noted", REPEAT, pair.place, "chosen, rejected")
                kept.append(pair)
        self.report.kept -= len({pair.place for pair in part.pairs} - {pair.place for pair in kept})
        return kept

    def _shared_ids(self, part: ChunkPairs) -> set[str]:
        """Return the places of rows whose prompt_id belonged to another prompt before."""
        if not part.prompt_ids:
            return set()
        ids, prompts, places = zip(*part.prompt_ids, strict=True)
        values = _uints([hash_text(prompt) for prompt in prompts])
        known, first = self.seen_ids.add(_uints([hash_text(own) for own in ids]), values)
        shared = [places[index] for index in np.flatnonzero(known & (first != values)).tolist()]
        for place in shared:
            self._note_bad(SHARED_ID, place, "prompt_id")
        return set(shared)

    def _note_bad(self, reason: str, place: str, column: str) -> None:
        stops = self.rules.bad_rows == "error"
        self.report.note("faults" if stops else "dropped", reason, place, column, remedy=LEAVE_OUT if stops else "")


class FirstSeen:
    """A dictionary from 64-bit keys to 64-bit values that keeps the first value of each key, at 16 bytes per key.

    It consists of sorted arrays of doubling sizes; a dict would take six times the memory.
    """

    def __init__(self) -> None:
        self._levels: list[tuple[UInts, UInts]] = []

    def add(self, keys: UInts, values: UInts) -> tuple[NDArray[np.bool_], UInts]:
        """Add keys with their values.

        Args:
            keys, values: [n] uint64; keys may repeat.

        Returns:
            For each key whether it was added before, also earlier in ``keys``, and the value it was first added with.
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
        earlier = fresh[index[inverse]]  # np.unique returns the first index of each
        repeated = earlier != fresh
        known[fresh[repeated]] = True
        first[fresh[repeated]] = values[earlier[repeated]]
        if len(unique):
            self._push(unique, values[fresh[index]])
        return known, first

    def _push(self, keys: UInts, values: UInts) -> None:
        while self._levels and len(self._levels[-1][0]) <= 2 * len(keys):
            other_keys, other_values = self._levels.pop()
            keys, values = np.concatenate([other_keys, keys]), np.concatenate([other_values, values])
            order = np.argsort(keys, kind="stable")
            keys, values = keys[order], values[order]
        self._levels.append((keys, values))


def _uints(values: Sequence[int]) -> UInts:
    return np.array(values, dtype=np.uint64)
