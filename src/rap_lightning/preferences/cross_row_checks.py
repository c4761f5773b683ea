"""Checks across rows: repeated pairs, contradicting pairs, and prompt ids that two prompts share."""

from __future__ import annotations

from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.hashing import hash_text, hash_turns, hash_unordered
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.rows_to_pairs import LEAVE_OUT, ChunkPairs
from rap_lightning.preferences.rules import Rules

CONTRADICTION = "the same two responses to the same prompt, the other way round"
REPEAT = "a pair that was read before"
REWEIGHED = "a pair that was read before, with another weight"
SHARED_ID = "a prompt_id that another prompt has as well"


class CrossRowChecks:
    """Check the pairs of each chunk against those of all earlier chunks of a split."""

    def __init__(self, rules: Rules, report: DataReport) -> None:
        self.rules, self.report = rules, report
        # digests alone, so that memory does not grow with the length of texts
        self.seen_pairs: dict[int, int] = {}  # digest of a pair in either order -> id of the first such pair
        self.weights: dict[int, float] = {}  # of the first pair with this digest, where it is not 1
        self.seen_ids: dict[int, int] = {}  # digest of a prompt_id -> digest of its first prompt

    def keep(self, part: ChunkPairs) -> list[Pair]:
        shared = set()
        for own, prompt, place in part.prompt_ids:
            digest = hash_text(prompt)
            if self.seen_ids.setdefault(hash_text(own), digest) != digest:
                self._note_bad(SHARED_ID, place, "prompt_id")
                shared.add(place)
        kept = []
        for pair in part.pairs:
            if pair.place in shared:
                continue
            own_id = int(pair.id, 16)
            unordered = hash_unordered(hash_turns(pair.history), *map(hash_text, pair.responses))
            if unordered not in self.seen_pairs:
                self.seen_pairs[unordered] = own_id
                if pair.weight != 1:
                    self.weights[unordered] = pair.weight
                kept.append(pair)
            elif self.seen_pairs[unordered] != own_id:
                self._note_bad(CONTRADICTION, pair.place, "chosen, rejected")
            else:
                drop = self.rules.filters.repeats == "drop"
                reason = REPEAT if self.weights.get(unordered, 1.0) == pair.weight else REWEIGHED
                self.report.note("dropped" if drop else "noted", reason, pair.place, "chosen, rejected")
                kept += [] if drop else [pair]
        self.report.kept -= len({pair.place for pair in part.pairs} - {pair.place for pair in kept})
        return kept

    def _note_bad(self, reason: str, place: str, column: str) -> None:
        stops = self.rules.bad_rows == "error"
        self.report.note("faults" if stops else "dropped", reason, place, column, remedy=LEAVE_OUT if stops else "")
