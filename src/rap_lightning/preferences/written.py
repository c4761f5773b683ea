"""Relabelled pairs as parquet, in the conversational layout that trainers read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rap_lightning.preferences.chat import with_goal
from rap_lightning.preferences.ingest import Rules
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabel import RelabelledPair, relabel

MANIFEST = "manifest.json"
SHARD = 50_000  # scored pairs


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
        """Name the shards by their number, add the card, and put the folder in its place."""
        for split in sorted({path.name.rsplit("-", 1)[0] for path in self.partial.glob("*.parquet")}):
            shards = sorted(self.partial.glob(f"{split}-*.parquet"))
            for number, path in enumerate(shards):
                path.rename(self.partial / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
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


def batches_of(
    pairs: Iterable[Pair], rules: Rules, placement: Literal["system", "user"], system_shown: bool, rows: int = 1000
) -> Iterator[Any]:
    """Relabelled pairs as Arrow record batches."""
    remaining = iter(pairs)
    while part := list(islice(remaining, rows)):
        halves: list[RelabelledPair] = []
        places: list[str] = []
        for pair in part:
            for origin in rules.relabelling.of_ties if pair.tie else rules.relabelling.origins:
                halves.append(relabel(pair, rules.goal, origin))
                places.append(pair.place)
        yield _as_batch(halves, places, placement, system_shown)


def _as_batch(
    halves: Sequence[RelabelledPair], places: list[str], placement: Literal["system", "user"], system_shown: bool
) -> Any:
    import pyarrow as pa

    prompts = [with_goal(half.history, half.goal_text, placement, system_shown=system_shown) for half in halves]
    columns = [
        _turns([turn for turns in prompts for turn in turns], [len(turns) for turns in prompts]),
        _answers([half.chosen for half in halves]),
        _answers([half.rejected for half in halves]),
        pa.array([half.goal for half in halves], pa.string()),
        pa.array([half.origin for half in halves]),
        pa.array([half.rewards[0] for half in halves], pa.float64()),
        pa.array([half.rewards[1] for half in halves], pa.float64()),
        pa.array([half.pair_id for half in halves]),
        pa.array(places),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema())


def _turns(turns: Sequence[dict[str, Any]], lengths: Sequence[int]) -> Any:
    import numpy as np
    import pyarrow as pa

    roles = pa.array([turn["role"] for turn in turns], pa.string())
    contents = pa.array([turn["content"] for turn in turns], pa.string())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype("int32"))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([roles, contents], ["role", "content"]))


def _answers(texts: Sequence[str]) -> Any:
    return _turns([{"role": "assistant", "content": text} for text in texts], [1] * len(texts))
