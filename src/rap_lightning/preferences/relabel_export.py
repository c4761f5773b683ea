"""Write relabelled pairs as Parquet files, in the conversational layout of trainers: prompt, chosen, rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from rap_lightning.atomic_write import atomic_file
from rap_lightning.preferences.pairs import Message, Pair
from rap_lightning.preferences.relabelling import relabel
from rap_lightning.preferences.rendering import with_goal
from rap_lightning.preferences.rules import Rules

MANIFEST = "manifest.json"
SHARD = 50_000  # scored pairs
BATCH = 1000  # scored pairs in a record batch


class ShardedFolder:
    """A folder of Parquet files that appears once it is complete; an interrupted run can be resumed.

    ``key`` is a digest of everything that changes the content; an incomplete folder with another key is discarded.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output, self.key = output, key
        self.partial = output.with_name(f".{output.name}.partial")

    def open(self) -> int:
        """Create or resume the folder; return how many shards it has."""
        if self.partial.is_symlink():  # in a shared folder, it could lead anywhere
            self.partial.unlink()
        manifest = self.partial / MANIFEST
        if manifest.is_file() and json.loads(manifest.read_text())["key"] == self.key:
            return len(list(self.partial.glob("*.parquet")))
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        manifest.write_text(json.dumps({"key": self.key}))
        return 0

    def has(self, name: str) -> bool:
        return (self.partial / name).is_file()

    def write(self, name: str, batches: Iterable[Any], columns: Any) -> None:
        """Write one shard, which appears once it is complete."""
        with atomic_file(self.partial / name, "wb") as file:
            write_parquet(file, batches, columns)

    def close(self, card: str) -> None:
        """Add the card, and move the folder to its final name."""
        (self.partial / "README.md").write_text(card, encoding="utf-8")
        (self.partial / MANIFEST).unlink()
        if self.output.is_dir():
            self.output.rmdir()
        self.partial.rename(self.output)


def write_parquet(file: IO[bytes], batches: Iterable[Any], columns: Any) -> None:
    """Write record batches with the columns of :func:`schema`."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, columns, compression="zstd", compression_level=1) as writer:
        for batch in batches:
            writer.write_batch(batch)


def has_tools(pair: Pair) -> bool:
    """Return whether a pair's conversation has more than texts: tools, calls, what they returned, thoughts."""
    return pair.tools is not None or any(len(turn) > 2 for turn in pair.history)


def schema(tools: bool, weights: bool) -> Any:
    """Return the columns: three message lists, and where each pair comes from.

    Args:
        tools: also a column of tools, as JSON, and the fields of messages that call them. Arguments are JSON, as in the
            APIs: structs of Arrow would get each other's fields.
        weights: also a column of the pairs' weights.
    """
    import pyarrow as pa

    text = pa.string()
    call = pa.struct({"id": text, "type": text, "function": pa.struct({"name": text, "arguments": text})})
    more = {"tool_calls": pa.list_(call), "name": text, "tool_call_id": text, "reasoning_content": text}
    turns = pa.list_(pa.struct({"role": text, "content": text} | (more if tools else {})))
    return pa.schema(
        {
            "prompt": turns, "chosen": turns, "rejected": turns, "goal": pa.string(), "origin": pa.string(),
            "reward_chosen": pa.float64(), "reward_rejected": pa.float64(), "pair_id": pa.string(),
            "place": pa.string(),
        } | ({"tools": text} if tools else {}) | ({"weight": pa.float64()} if weights else {})
    )  # fmt: skip


def relabelled_batch(
    pairs: Sequence[Pair], rules: Rules, placement: Literal["system", "user"], system_shown: bool, columns: Any
) -> Any:
    """Return the training pairs of scored pairs as an Arrow record batch."""
    import pyarrow as pa

    tools, rows = "tools" in columns.names, []
    for pair in pairs:
        for made in rules.relabelling.made_of(pair, rules.goal):
            half = relabel(pair, rules.goal, *made)
            prompt = with_goal(half.history, half.goal_text, placement, system_shown=system_shown)
            rows.append(
                {
                    "prompt": [{**turn, "tool_calls": _calls(turn)} if tools else turn for turn in prompt],
                    "tools": pair.tools,
                    "chosen": [{"role": "assistant", "content": half.chosen}],
                    "rejected": [{"role": "assistant", "content": half.rejected}],
                    "goal": half.goal, "origin": half.origin, "reward_chosen": half.rewards[0],
                    "reward_rejected": half.rewards[1], "pair_id": half.pair_id, "place": pair.place,
                    "weight": pair.weight,
                }
            )  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=columns)


def _calls(turn: Message) -> list[dict[str, Any]] | None:
    """Return the calls of a turn, in the form of the APIs."""
    found = []
    for call in turn.get("tool_calls") or ():
        inner = call.get("function", call)
        arguments = json.dumps(inner.get("arguments", {}), ensure_ascii=False)
        function = {"name": inner["name"], "arguments": arguments}
        found.append({"id": call.get("id"), "type": call.get("type", "function"), "function": function})
    return found or None
