"""Relabelled pairs as parquet, in the conversational layout that trainers read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rap_lightning.preferences.columns import PairColumns
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabelling import ORIGINS, REJECTED_GOAL, UNCONDITIONED, RelabelledPair, relabel
from rap_lightning.preferences.rendering import SEPARATOR, with_goal
from rap_lightning.preferences.rules import Rules

MANIFEST = "manifest.json"
SHARD = 50_000  # scored pairs

Block = PairColumns | list[Pair]


class ShardedFolder:
    """A folder of parquet files that appears when it is whole; until then it can be gone on with.

    Args:
        output: the folder to make.
        key: of everything that changes what is written; an unfinished folder of another key is begun anew.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output, self.key = output, key
        self.partial = output.with_name(f".{output.name}.partial")

    def open(self) -> int:
        """Begin, or go on; returns how many shards are there already."""
        manifest = self.partial / MANIFEST
        if manifest.is_file() and json.loads(manifest.read_text())["key"] == self.key:
            return len(list(self.partial.glob("*.parquet")))
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        manifest.write_text(json.dumps({"key": self.key}))
        return 0

    def has(self, name: str) -> bool:
        """Whether a shard is there already."""
        return (self.partial / name).is_file()

    def write(self, name: str, batches: Iterable[Any]) -> None:
        """Write one shard; it appears when it is whole."""
        import pyarrow.parquet as pq

        unfinished = self.partial / f"{name}.unfinished"
        with pq.ParquetWriter(unfinished, schema(), compression="zstd", compression_level=1) as writer:
            for batch in batches:
                writer.write_batch(batch)
        unfinished.rename(self.partial / name)

    def close(self, card: str) -> None:
        """Add the card, and put the folder in its place."""
        (self.partial / "README.md").write_text(card, encoding="utf-8")
        (self.partial / MANIFEST).unlink()
        if self.output.is_dir():
            self.output.rmdir()
        self.partial.rename(self.output)


def schema() -> Any:
    """The columns: three message lists, and where each pair comes from."""
    import pyarrow as pa

    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    return pa.schema(
        {
            "prompt": turns, "chosen": turns, "rejected": turns, "goal": pa.string(), "origin": pa.string(),
            "reward_chosen": pa.float64(), "reward_rejected": pa.float64(), "pair_id": pa.string(),
            "place": pa.string(),
        }
    )  # fmt: skip


def shards_of(blocks: Iterable[Block], size: int = SHARD) -> Iterator[list[Block]]:
    """Blocks of pairs in lots of at least ``size`` pairs."""
    lot: list[Block] = []
    for block in blocks:
        lot.append(block)
        if sum(map(len, lot)) >= size:
            yield lot
            lot = []
    if lot:
        yield lot


def relabelled(
    blocks: Iterable[Block], rules: Rules, placement: Literal["system", "user"], system_shown: bool
) -> Iterator[Any]:
    """Relabelled pairs as Arrow record batches."""
    for block in blocks:
        if isinstance(block, PairColumns) and placement == "system" and system_shown and not block.tie.any():
            yield _relabel_columns(block, rules)
        else:
            pairs = block.pairs() if isinstance(block, PairColumns) else block
            yield _relabel_rows(pairs, rules, placement, system_shown)


def _relabel_rows(pairs: Sequence[Pair], rules: Rules, placement: Literal["system", "user"], system_shown: bool) -> Any:
    import pyarrow as pa

    halves: list[RelabelledPair] = []
    places: list[str] = []
    for pair in pairs:
        for origin in rules.relabelling.of_ties if pair.tie else rules.relabelling.origins:
            halves.append(relabel(pair, rules.goal, origin))
            places.append(pair.place)
    prompts = [with_goal(half.history, half.goal_text, placement, system_shown=system_shown) for half in halves]
    turns = [turn for prompt in prompts for turn in prompt]
    columns = [
        _turns([turn["role"] for turn in turns], [turn["content"] for turn in turns], list(map(len, prompts))),
        _answers(pa.array([half.chosen for half in halves], pa.string())),
        _answers(pa.array([half.rejected for half in halves], pa.string())),
        pa.array([half.goal for half in halves], pa.string()),
        pa.array([half.origin for half in halves], pa.string()),
        pa.array([half.rewards[0] for half in halves], pa.float64()),
        pa.array([half.rewards[1] for half in halves], pa.float64()),
        pa.array([half.pair_id for half in halves], pa.string()),
        pa.array(places, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema())


def _relabel_columns(block: PairColumns, rules: Rules) -> Any:
    """The same for a block of columns, by index arithmetic: training pair i of V is half i % V of pair i // V."""
    import pyarrow as pa

    origins = np.array(rules.relabelling.origins)
    count, width = len(block), len(origins)
    row, origin = np.repeat(np.arange(count), width), np.tile(origins, count)
    half = (origin == REJECTED_GOAL).astype(np.int64)
    asked = np.where(origin == UNCONDITIONED, -1, half)
    texts, printed, goal_of = _goals(block, rules)
    goal = np.where(asked < 0, -1, goal_of[row, half])
    winner, loser = block.responses
    both = pa.concat_arrays([winner, loser])
    rewards = block.rewards
    columns = [
        _prompts(block, row, goal, texts),
        _answers(both.take(pa.array(row + half * count))),
        _answers(both.take(pa.array(row + (1 - half) * count))),
        printed.take(pa.array(goal, mask=goal < 0)),
        pa.array(ORIGINS).take(pa.array(origin)),
        pa.array(rewards[row, half]),
        pa.array(rewards[row, 1 - half]),
        pa.array([f"{value:016x}" for value in block.ids.tolist()], pa.string()).take(pa.array(row)),
        pa.array(block.places(), pa.string()).take(pa.array(row)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema())


def _goals(block: PairColumns, rules: Rules) -> tuple[Any, Any, Any]:
    """The different goals' texts and printed numbers, and which of them each response asks for, [n, 2]."""
    import pyarrow as pa

    values, inverse = np.unique(block.rewards, return_inverse=True)
    goals = [rules.goal.goal_of(value) for value in values.tolist()] if rules.goal is not None else []
    assert rules.goal is not None, "columns are only made with a goal"
    texts = pa.array([rules.goal.write(*goal) for goal in goals], pa.string())
    printed = pa.array([rules.goal.printed(*goal) for goal in goals], pa.string())
    return texts, printed, inverse.reshape(block.rewards.shape)


def _prompts(block: PairColumns, row: Any, goal: Any, texts: Any) -> Any:
    """Histories with the goal as the system message, or before the data's own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    flat = block.turns.flatten()
    roles, contents = pc.struct_field(flat, "role"), pc.struct_field(flat, "content")
    starts = np.asarray(block.turns.offsets, dtype=np.int64)[:-1] - block.turns.offsets[0].as_py()
    own = np.asarray(block.turns.value_lengths(), dtype=np.int64)
    has_system = np.asarray(pc.equal(roles.take(pa.array(starts)), "system"))[row]
    asks = goal >= 0
    own, starts = own[row], starts[row]
    lead = asks & ~has_system  # a turn more than the history has
    lengths = own + lead
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # place within the prompt
    source = np.repeat(starts - lead, lengths) + at
    first = at == 0
    # texts to pick from: the histories' own, goals alone, and goals joined with a system message of the data's own
    merged = np.flatnonzero(asks & has_system)
    joins = pc.binary_join_element_wise(
        texts.take(pa.array(goal[merged])), contents.take(pa.array(starts[merged])), SEPARATOR
    )
    pool = pa.concat_arrays([contents, texts, joins.cast(pa.string())])
    pick = source.copy()
    front = np.flatnonzero(first)
    pick[front[lead]] = len(contents) + goal[lead]
    pick[front[merged]] = len(contents) + len(texts) + np.arange(len(merged))
    role_pool = pa.concat_arrays([roles, pa.array(["system"])])
    role_pick = source.copy()
    role_pick[front[lead]] = len(roles)
    return _turns(role_pool.take(pa.array(role_pick)), pool.take(pa.array(pick)), lengths)


def _turns(roles: Any, contents: Any, lengths: Any) -> Any:
    import pyarrow as pa

    parts = [part if isinstance(part, pa.Array) else pa.array(part, pa.string()) for part in (roles, contents)]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(parts, ["role", "content"]))


def _answers(texts: Any) -> Any:
    import pyarrow as pa

    roles = pa.array(["assistant"]).take(pa.array(np.zeros(len(texts), dtype=np.int32)))
    return _turns(roles, texts, np.ones(len(texts), dtype=np.int32))
