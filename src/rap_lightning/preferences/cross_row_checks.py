"""What only shows when rows are held against each other: repeats, contradictions, ids of two prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rap_lightning.preferences.columns import PairColumns
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.dedup_index import Seen
from rap_lightning.preferences.hashing import Hashes, hash_text, hash_turns, hash_unordered
from rap_lightning.preferences.ingest import LEAVE_OUT, Ingested
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.rules import Rules

CONTRADICTION = "the same two responses to the same prompt, the other way round"
REPEAT = "a pair that was read before"
OTHER_PROMPT = "a prompt_id that stands for another prompt as well"


class AcrossRows:
    """What only shows when rows are held against each other."""

    def __init__(self, rules: Rules, report: DataReport) -> None:
        self.rules, self.report = rules, report
        self.kind = "faults" if rules.bad_rows == "error" else "dropped"
        self.seen_pairs, self.seen_ids = Seen(), Seen()

    def check(self, part: Ingested) -> PairColumns | list[Pair]:
        """The pairs to keep."""
        wrong = self._check_ids(part)
        if part.columns is not None:
            return self._check_columns(part.columns, wrong)
        pairs = [pair for pair in part.pairs if pair.place not in wrong]
        histories = [hash_turns(pair.history) for pair in pairs]
        texts = [[hash_text(text) for text in pair.responses] for pair in pairs]
        keys = [hash_unordered(turns, *both) for turns, both in zip(histories, texts, strict=True)]
        mask = self._mask(_uints(keys), _uints([int(pair.id, 16) for pair in pairs]), [pair.place for pair in pairs])
        kept = [pair for pair, keep in zip(pairs, mask, strict=True) if keep]
        self.report.kept -= len({pair.place for pair in part.pairs} - {pair.place for pair in kept})
        return kept

    def _check_columns(self, columns: PairColumns, wrong: set[str]) -> PairColumns:
        kept = columns
        if wrong:
            kept = kept.take(np.array([place not in wrong for place in columns.places()]))
        kept = kept.take(self._mask(kept.keys, kept.ids, kept))
        self.report.kept -= len(columns) - len(kept)
        return kept

    def _mask(self, keys: Hashes, ids: Hashes, places: PairColumns | list[str]) -> NDArray[np.bool_]:
        known, before = self.seen_pairs.add(keys, ids)
        keep = np.ones(len(keys), dtype=bool)
        for index in np.flatnonzero(known).tolist():
            place = places.place(index) if isinstance(places, PairColumns) else places[index]
            if before[index] != ids[index]:
                self._note(CONTRADICTION, place, "chosen, rejected")
                keep[index] = False
            elif self.rules.filters.repeats == "drop":
                self.report.note("dropped", REPEAT, place, "chosen, rejected")
                keep[index] = False
            else:
                self.report.note("noted", REPEAT, place, "chosen, rejected")
        return keep

    def _note(self, reason: str, place: str, column: str) -> None:
        self.report.note(self.kind, reason, place, column).learn(None, LEAVE_OUT if self.kind == "faults" else "")

    def _check_ids(self, part: Ingested) -> set[str]:
        """The places of rows whose prompt_id stood for another prompt before."""
        if not part.ids:
            return set()
        part.ids.sort(key=lambda found: found[0])
        keys, values = (
            _uints([hash_text(text) for text in column]) for column in list(zip(*part.ids, strict=True))[1:3]
        )
        known, before = self.seen_ids.add(keys, values)
        wrong = [part.ids[index][3] for index in np.flatnonzero(known & (before != values)).tolist()]
        for place in wrong:
            self._note(OTHER_PROMPT, place, "prompt_id")
        return set(wrong)


def _uints(values: Sequence[int]) -> Hashes:
    return np.array(values, dtype=np.uint64)
