"""Scored pairs, encoded once, seen as training pairs.

A scored pair becomes one row (:class:`PairEncoder`): its prompt under each goal, and both responses once each. The rows
are an Arrow table on disk (:func:`encode_pairs`); training pairs are found in it by index arithmetic
(:class:`EncodedPairs`, rap_lightning.preferences.relabelling).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch.utils.data import Dataset

from rap_lightning.batches.encode import Conversation, EncodedConversation, Encoder
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.errors import DataError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import StatedGoal
from rap_lightning.preferences.pair_cache import as_pair
from rap_lightning.preferences.pairs import BadRow, Pair
from rap_lightning.preferences.relabelling import (
    ORIGIN_TABLE,
    ORIGINS,
    RelabelledPair,
    Relabelling,
    TrainingIndex,
    relabel,
)
from rap_lightning.preferences.source_mix import copies

FORMAT = 8
"""Part of the cache key: raise it when the columns of an encoded row change. (``Encoder.key`` covers its own code.)"""
SAME = "both responses have the same tokens"
ROWS = 250
"""Rows that are encoded at a time."""
DIGESTED = 1000
"""Rows whose bytes are hashed at a time."""

EncodedRow = dict[str, Any]
"""A row of the Arrow table, with the columns of :func:`features`."""


@dataclass(frozen=True)
class Example:
    """One training pair as token ids; see :class:`rap_lightning.batches.types.Batch` for the units."""

    pair_id: str
    origin: int
    goal: str | None
    rewards: tuple[float, float]
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    goal_reward: float = math.nan
    strength: float | None = None
    weight: float = 1.0

    @property
    def size(self) -> PairSize:
        return PairSize(len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids))


# -- a scored pair to a row -------------------------------------------------------------------------------------------


class PairEncoder:
    """Encodes scored pairs, some at a time."""

    def __init__(self, encoder: Encoder, relabelling: Relabelling) -> None:
        self.encoder, self.relabelling = encoder, relabelling

    def __call__(self, pairs: Sequence[Pair]) -> list[EncodedRow]:
        """A row for each pair; ``dropped`` says why a pair can't be encoded, and most columns are then missing."""
        rows: list[EncodedRow] = []
        for pair, found in zip(pairs, self.encoder.encode([self._conversation(pair) for pair in pairs]), strict=True):
            if not isinstance(found, BadRow) and _alike(found):
                found = BadRow("chosen, rejected", SAME)
            if isinstance(found, BadRow):
                rows.append({"place": pair.place, "dropped": found.reason, "column": found.column})
                continue
            made = self._relabelled(pair)
            rows.append(
                {
                    "pair_id": pair.id,
                    "place": pair.place,
                    "dropped": None,
                    "tie": pair.tie,
                    "rewards": list(pair.rewards),
                    "weight": pair.weight,
                    "origins": [ORIGINS.index(one.origin) for one in made],
                    "goals": [one.goal for one in made],
                    "goal_rewards": [one.goal_reward for one in made],
                    "strengths": [one.strength for one in made],
                    "prompt_ids": found.prompt_ids,
                    "response_ids": found.response_ids,
                    "repaired": found.repaired,
                    "cut_prompt": max(found.cut_prompts),
                    "cut_response": found.cut_responses,
                }
            )
        return rows

    def _conversation(self, pair: Pair) -> Conversation:
        columns = ("rejected", "chosen") if pair.exchanged else ("chosen", "rejected")
        texts = tuple(stated.text for stated in self.goals_of(pair))
        return Conversation(pair.history, texts, pair.responses, columns, pair.tools)

    def readable(self, pair: Pair) -> list[tuple[str, str, str]]:
        """Prompt, chosen and rejected response of each training pair as text of their ids.

        Raises:
            BadRow: the pair can't be encoded.
        """
        found, readable = self.encoder.encode_one(self._conversation(pair)), self.encoder.readable
        first, second = map(readable, found.response_ids)
        return [
            (readable(ids), *((second, first) if ORIGIN_TABLE[made.origin].chosen else (first, second)))
            for made, ids in zip(self.relabelling.made_of(pair, self.encoder.goal), found.prompt_ids, strict=True)
        ]

    def goals_of(self, pair: Pair) -> tuple[StatedGoal, ...]:
        """What is asked for of the pair's responses, in the order of ``prompt_ids``."""
        return tuple(StatedGoal(one.goal_text, one.strength) for one in self._relabelled(pair))

    def _relabelled(self, pair: Pair) -> list[RelabelledPair]:
        goal = self.encoder.goal
        return [relabel(pair, goal, *made) for made in self.relabelling.made_of(pair, goal)]


def _alike(found: EncodedConversation) -> bool:
    """Whether two responses, of which nothing was cut, can't be told apart."""
    first, second = found.response_ids
    return first == second and not any(found.cut_responses)


def features() -> Any:
    """The columns of an encoded row.

    ``datasets`` would infer the type of a column from its first rows, and fail at later ones where those are empty.
    """
    from datasets import Features, List, Value

    ids = List(List(Value("int32")))
    return Features(
        pair_id=Value("string"), place=Value("string"), tie=Value("bool"), rewards=List(Value("float64")),
        weight=Value("float64"),
        origins=List(Value("int8")), goals=List(Value("string")), goal_rewards=List(Value("float64")),
        strengths=List(Value("float64")), prompt_ids=ids, response_ids=ids,
        dropped=Value("string"), column=Value("string"),
        repaired=List(Value("string")), cut_prompt=Value("int64"), cut_response=List(Value("int64")),
    )  # fmt: skip


def note_encoding(rows: Iterable[EncodedRow], report: DataReport) -> list[bool]:
    """Count in the report what became of encoded rows; returns for each whether it was encoded."""
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


# -- a row to training pairs ------------------------------------------------------------------------------------------


def example_of(row: EncodedRow, place: int) -> Example:
    """The training pair at a place among those that an encoded row becomes."""
    origin = row["origins"][place]
    half = ORIGIN_TABLE[origin].chosen
    return Example(
        pair_id=row["pair_id"],
        origin=origin,
        goal=row["goals"][place],
        rewards=(row["rewards"][half], row["rewards"][1 - half]),
        prompt_ids=row["prompt_ids"][place],
        chosen_ids=row["response_ids"][half],
        rejected_ids=row["response_ids"][1 - half],
        goal_reward=row["goal_rewards"][place],
        strength=row["strengths"][place],
        weight=row["weight"],
    )


class EncodedPairs(Dataset[Any]):
    """The training pairs over a table of encoded scored pairs."""

    def __init__(self, table: Any, relabelling: Relabelling) -> None:
        self.table, self.relabelling = table, relabelling
        self.index = TrainingIndex(_column(table, "origins"))

    def __len__(self) -> int:
        return len(self.index)

    def digest(self, *columns: str) -> str:
        """Digest of every encoded pair, in order, or of some columns: the same wherever the same data were encoded."""
        table = self.table.select_columns(list(columns)) if columns else self.table
        table, found = table.with_format("arrow"), hashlib.sha256(b"" if columns else str(self.relabelling).encode())
        for first in range(0, len(table), DIGESTED):
            block = table[first : first + DIGESTED].replace_schema_metadata(None).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, block.schema) as stream:
                stream.write_table(block)
            found.update(sink.getvalue())
        return found.hexdigest()[:12]

    def loss_weights(self, origin_weights: Sequence[float]) -> list[float] | None:
        """Weight of each training pair's loss: that of its origin times that of its pair; None where all are 1."""
        own = _column(self.table, "weight")
        if set(origin_weights) == {1.0} and all(one == 1.0 for one in own):
            return None
        return [
            own[row] * origin_weights[origin] for row, origin in zip(self.index.rows, self.index.origins, strict=True)
        ]

    def example(self, index: int) -> Example:
        row, place = self.index[index]
        return example_of(self.table[row], place)

    def sizes(self) -> list[PairSize]:
        """Tokens of every training pair, as :meth:`example` gives it, read from the columns' offsets alone."""
        found = []
        columns = self.table.select_columns(["origins", "prompt_ids", "response_ids"]).with_format("arrow")
        for rows in columns.iter(1000):
            both = ([[len(ids) for ids in row] for row in rows[name]] for name in ("prompt_ids", "response_ids"))
            for origins, prompts, responses in zip(rows["origins"].to_pylist(), *both, strict=True):
                for origin, prompt in zip(origins, prompts, strict=True):
                    half = ORIGIN_TABLE[origin].chosen
                    found.append(PairSize(prompt, responses[half], responses[1 - half]))
        return found

    def __getitem__(self, plan: BatchPlan) -> tuple[BatchPlan, list[Example]]:
        """The examples of a whole batch: the sampler plans batches, not rows."""
        return plan, [self.example(index) for index in plan.indices]


def encode_pairs(
    pairs: Any,
    encoder: Encoder,
    relabelling: Relabelling,
    report: DataReport,
    *,
    num_proc: int | None = None,
    strict: bool = False,
) -> EncodedPairs:
    """Tokenise a table of scored pairs, with progress, cached by content.

    The report gets what was repaired, truncated or dropped here, and the final counts; with ``strict``, a pair that
    can't be encoded is an error.
    """
    table = pairs.map(
        _encode_rows,
        batched=True,
        batch_size=ROWS,
        remove_columns=pairs.column_names,
        features=features(),
        fn_kwargs={"encode": PairEncoder(encoder, relabelling)},
        num_proc=num_proc,
        new_fingerprint=f"{pairs._fingerprint}-{encoder.key()}-{FORMAT}",
        desc=f"encoding {report.split}",
    )
    facts = table.select_columns(["place", "dropped", "column", "repaired", "cut_prompt", "cut_response"])
    keep = [index for index, encoded in enumerate(note_encoding(facts, report)) if encoded]
    whole = EncodedPairs(table.select(keep), relabelling)
    report.pairs, report.relabelled = len(keep), len(whole)
    incomplete = strict and len(keep) < len(table)
    if incomplete or not keep:
        what = "pairs that can't be encoded" if incomplete else "no pair is left to train on"
        raise DataError("\n".join([f"{report.source} (split {report.split}): {what}.", *report.lines()]))
    return whole


def join_weighted(parts: Sequence[tuple[EncodedPairs, float]], seed: int) -> EncodedPairs:
    """The pairs of several sources, each as often as its source's weight says; the parts must not be empty."""
    from datasets import concatenate_datasets

    tables = []
    for encoded, weight in parts:
        ids = enumerate(_column(encoded.table, "pair_id"))
        tables.append(encoded.table.select([row for row, one in ids for _ in range(copies(one, weight, seed))]))
    return EncodedPairs(concatenate_datasets(tables), parts[0][0].relabelling)


def _column(table: Any, name: str) -> list[Any]:
    values: list[Any] = table.select_columns([name])[:][name]
    return values


def _encode_rows(batch: dict[str, list[Any]], encode: PairEncoder) -> dict[str, list[Any]]:
    names = list(batch)
    pairs = [as_pair(dict(zip(names, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    rows = encode(pairs)
    return {name: [row.get(name) for row in rows] for name in features()}
