"""A scored pair to token ids: its prompt under each goal, and both responses, once each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from rap_lightning.batches.assemble import Assembled, Assembler, Job
from rap_lightning.batches.encode import Encoder, Notes
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pairs import BadRow, Pair
from rap_lightning.preferences.relabelling import REJECTED_GOAL, UNCONDITIONED, Relabelling

log = logging.getLogger("rap_lightning")

FORMAT = 3  # part of the cache key: raise it when the columns below or the encoding change
CHECK_EVERY = 250


class PairEncoder:
    """Encodes scored pairs: assembled where that is proved to give the same ids, sequence by sequence otherwise.

    Args:
        encoder: renders and tokenises.
        relabelling: which prompts a pair needs.
    """

    def __init__(self, encoder: Encoder, relabelling: Relabelling) -> None:
        self.encoder, self.relabelling = encoder, relabelling
        self.assembler = Assembler(encoder)
        self._until_check = 0

    def __call__(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """A row for each pair; one that can't be encoded says why in ``dropped``."""
        jobs = [Job(pair.history, self.goal_texts(pair), pair.responses) for pair in pairs]
        rows = []
        for pair, job, found in zip(pairs, jobs, self.assembler.encode(jobs), strict=True):
            row = None if found is None or pair.tools is not None else self._assembled(pair, found)
            self._until_check -= 1
            if row is None or self._until_check < 0:  # now and then both ways: a guard, at little cost
                self._until_check = CHECK_EVERY
                whole = self._whole(pair, job)
                if row is not None and row != whole:  # not to be; then nothing assembled is to be trusted
                    log.warning("assembled token ids differ from those of whole sequences; encoding those instead")
                    self.assembler.proof = None
                    return self(pairs)
                row = whole
            rows.append(row)
        return rows

    def goal_texts(self, pair: Pair) -> tuple[str | None, ...]:
        """What the pair's prompts ask for, in the order in which its row has them; None is the plain prompt."""
        goal = self.encoder.goal
        texts: list[str | None] = []
        for origin in self.relabelling.origins:
            if goal is None or origin == UNCONDITIONED:
                texts.append(None)
            else:
                half = 1 if origin == REJECTED_GOAL else 0
                texts.append(goal.write(*goal.goal_of(pair.rewards[half], pair.attributes[half])))
        return tuple(texts)

    def _assembled(self, pair: Pair, found: Assembled) -> dict[str, Any] | None:
        encoder = self.encoder
        longest = max(map(len, found.response_ids))
        if max(map(len, found.prompt_ids)) > max(encoder.max_prompt_length, encoder.max_length - longest):
            return None  # a prompt must be cut, which takes its text
        return self._row(pair, found.prompt_ids, found.response_ids, 0, Notes())

    def _whole(self, pair: Pair, job: Job) -> dict[str, Any]:
        encoder, notes = self.encoder, Notes()
        try:
            prompts = [encoder.prompt(pair.history, text, notes, pair.tools) for text in job.goal_texts]
            sides = ("rejected", "chosen") if pair.exchanged else ("chosen", "rejected")
            responses = [
                encoder.response(prompts[0], text, notes, side)
                for text, side in zip(pair.responses, sides, strict=True)
            ]
            longest = max(map(len, responses))
            fitted = [encoder.fit(prompt, pair.history, longest) for prompt in prompts]
        except BadRow as problem:
            return _result(pair_id=pair.id, place=pair.place, dropped=problem.reason, column=problem.column)
        cut = max(prompt.cut for prompt in fitted)
        return self._row(pair, [prompt.ids for prompt in fitted], responses, cut, notes)

    def _row(
        self, pair: Pair, prompts: list[list[int]], responses: list[list[int]], cut: int, notes: Notes
    ) -> dict[str, Any]:
        goal = self.encoder.goal
        room = self.encoder.max_length - max(map(len, prompts))
        goals = [goal.goal_of(r, a) for r, a in zip(pair.rewards, pair.attributes, strict=True)] if goal else []
        return _result(
            pair_id=pair.id,
            place=pair.place,
            tie=pair.tie,
            rewards=list(pair.rewards),
            goals=[goal.printed(*asked) for asked in goals] if goal else [],
            prompt_ids=prompts,
            response_ids=responses,
            repaired=sorted(set(notes.repaired)),
            cut_prompt=cut,
            cut_response=[max(0, len(ids) - room) for ids in responses],
        )


def features() -> Any:
    """The columns of an encoded row. Left to be guessed, a column that is empty at first would refuse later values."""
    from datasets import Features, List, Value

    ids = List(List(Value("int32")))
    return Features(
        pair_id=Value("string"), place=Value("string"), tie=Value("bool"), rewards=List(Value("float64")),
        goals=List(Value("string")), prompt_ids=ids, response_ids=ids, dropped=Value("string"), column=Value("string"),
        repaired=List(Value("string")), cut_prompt=Value("int64"), cut_response=List(Value("int64")),
    )  # fmt: skip


def _result(**values: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "pair_id": "",
        "place": "",
        "tie": False,
        "rewards": [],
        "goals": [],
        "prompt_ids": [],
        "response_ids": [],
        "dropped": "",
        "column": "",
        "repaired": [],
        "cut_prompt": 0,
        "cut_response": [0, 0],
    }
    return empty | values


def note_encoding(rows: Iterable[dict[str, Any]], report: DataReport) -> list[bool]:
    """Count what became of encoded rows; returns of each whether it was encoded."""
    good: set[str] = set()
    lost: set[str] = set()
    encoded = []
    for row in rows:
        place = row["place"]
        encoded.append(not row["dropped"])
        (lost if row["dropped"] else good).add(place)
        if row["dropped"]:
            report.note("dropped", row["dropped"], place, row["column"])
            continue
        for reason in row["repaired"]:
            report.note("repaired", reason, place, "chosen, rejected or prompt")
        if row["cut_prompt"]:
            report.note("truncated", "prompt text cut, goal kept", place, "prompt")
        for name, cut in zip(("chosen", "rejected"), row["cut_response"], strict=True):
            if cut:
                report.note("truncated", f"end of the {name} response cut", place, name)
    report.kept -= len(lost - good)
    return encoded
