"""Scored pairs, encoded once, seen as training pairs.

Each scored pair is one row of an Arrow table with its prompts under either goal and both responses; training pairs are
found by index arithmetic over it (rap_lightning.preferences.relabelling).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch.utils.data import Dataset

from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.pair_encoder import FORMAT, PairEncoder, features, note_encoding
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.errors import DataError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pair_cache import as_pair
from rap_lightning.preferences.relabelling import REJECTED_GOAL, UNCONDITIONED, Relabelling, TrainingIndex

ROWS = 250  # encoded at a time
DIGESTED = 1000  # rows whose bytes are hashed at a time


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


class EncodedPairs(Dataset[Any]):
    """The training pairs over a table of encoded scored pairs, those that tie last.

    Args:
        table: a ``datasets.Dataset`` with the columns of :func:`features`.
        relabelling: what each scored pair becomes.
        max_length: tokens of prompt and response together.
        ties: how many of the last rows tie.
    """

    def __init__(self, table: Any, relabelling: Relabelling, max_length: int, ties: int = 0) -> None:
        self.table, self.relabelling, self.max_length = table, relabelling, max_length
        self.index = TrainingIndex(len(table) - ties, ties, relabelling)

    def __len__(self) -> int:
        return len(self.index)

    def digest(self) -> str:
        """Of every encoded pair, in order: the same wherever the same data were encoded in the same way."""
        table, found = (
            self.table.with_format("arrow"),
            hashlib.sha256(str((self.relabelling, self.max_length)).encode()),
        )
        for first in range(0, len(table), DIGESTED):
            block = table[first : first + DIGESTED].replace_schema_metadata(None).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, block.schema) as stream:
                stream.write_table(block)
            found.update(sink.getvalue())
        return found.hexdigest()[:12]

    def example(self, index: int) -> Example:
        """Training pair ``index``."""
        row, origin = self.index[index]
        return example_of(self.table[row], origin, self.relabelling, self.max_length)

    def sizes(self) -> list[PairSize]:
        """Tokens of every training pair, as :meth:`example` gives it, read from the columns' offsets alone."""
        lengths = []
        for rows in self.table.select_columns(["prompt_ids", "response_ids"]).with_format("arrow").iter(1000):
            lengths += list(zip(*(_lengths(rows[name]) for name in ("prompt_ids", "response_ids")), strict=True))
        found = []
        for index in range(len(self)):
            row, origin = self.index[index]
            prompts, responses = lengths[row]
            half = 1 if origin == REJECTED_GOAL else 0
            room = self.max_length - max(prompts)
            chosen, rejected = (min(responses[which], room) for which in (half, 1 - half))
            found.append(PairSize(prompts[self.relabelling.origins.index(origin)], chosen, rejected))
        return found

    def __getitem__(self, plan: BatchPlan) -> tuple[BatchPlan, list[Example]]:
        """The examples of a whole batch: the sampler plans batches, not rows."""
        return plan, [self.example(index) for index in plan.indices]


def example_of(row: dict[str, Any], origin: int, relabelling: Relabelling, max_length: int) -> Example:
    """A training pair of an encoded row; responses are cut so that prompt and response fit ``max_length``."""
    half = 1 if origin == REJECTED_GOAL else 0
    prompts = row["prompt_ids"]
    room = max_length - max(map(len, prompts))  # the same under every goal, so that cuts are too
    chosen, rejected = (row["response_ids"][which][:room] for which in (half, 1 - half))
    rewards = row["rewards"]
    return Example(
        pair_id=row["pair_id"],
        origin=origin,
        goal=None if origin == UNCONDITIONED else row["goals"][half],
        rewards=(rewards[half], rewards[1 - half]),
        prompt_ids=prompts[relabelling.origins.index(origin)],
        chosen_ids=chosen,
        rejected_ids=rejected,
    )


def encode_pairs(
    pairs: Any,
    encoder: Encoder,
    relabelling: Relabelling,
    report: DataReport,
    *,
    num_proc: int | None = None,
    strict: bool = False,
) -> EncodedPairs:
    """Tokenise scored pairs, with progress, cached by content.

    Args:
        pairs: a table of scored pairs (rap_lightning.preferences.pair_cache).
        encoder: renders and tokenises.
        relabelling: what each pair becomes.
        report: gets what was repaired, truncated or dropped here, and the final counts.
        num_proc: processes that share the work.
        strict: stop where a pair can't be encoded, instead of dropping and counting it.

    Raises:
        DataError: no pair can be encoded, or one can't and that is to be an error.
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
    keep: list[int] = []
    ties: list[int] = []
    facts = table.select_columns(["place", "dropped", "column", "repaired", "cut_prompt", "cut_response", "tie"])
    for index, (encoded, tie) in enumerate(zip(note_encoding(facts, report), facts["tie"], strict=True)):
        if encoded:
            (ties if tie else keep).append(index)
    if strict and len(keep) + len(ties) < len(table):
        raise DataError(
            "\n".join([f"{report.source} (split {report.split}): pairs that can't be encoded.", *report.lines()])
        )
    if not keep and not ties:
        raise DataError(
            f"{report.source} (split {report.split}): no pair is left to train on.\n" + "\n".join(report.lines())
        )
    whole = EncodedPairs(table.select(keep + ties), relabelling, encoder.max_length, len(ties))
    report.pairs, report.relabelled = len(keep) + len(ties), len(whole)
    return whole


def _encode_rows(batch: dict[str, list[Any]], encode: PairEncoder) -> dict[str, list[Any]]:
    names = list(batch)
    pairs = [as_pair(dict(zip(names, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    rows = encode(pairs)
    return {name: [row[name] for row in rows] for name in rows[0]}


def _lengths(column: Any) -> list[list[int]]:
    """The lengths of the inner lists of an Arrow column of lists of lists."""
    from pyarrow import compute

    inner = iter(compute.list_value_length(compute.list_flatten(column)).to_pylist())
    return [[next(inner) for _ in range(count)] for count in compute.list_value_length(column).to_pylist()]
