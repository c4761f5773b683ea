"""A cache of scored pairs on disk: read once, then memory-mapped, so that memory does not grow with their number."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from rap_lightning import __version__
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.hashing import hash_text
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.rules import Rules, key_of
from rap_lightning.preferences.sources import Source, cache_unusable, fingerprint

FORMAT = 6  # part of the cache key: increment it when the columns or the reading of rows change


def stored_pairs(
    source: Source, split: str, rules: Rules, *, num_proc: int | None = None, cache: Path | None = None
) -> tuple[Any, DataReport]:
    """Return the scored pairs of a split as a memory-mapped ``datasets.Dataset``, and the report of reading them.

    The key of the cache is a digest of the source's content and the rules. Several runs can use it at the same time.
    """
    import datasets

    root = cache or Path(datasets.config.HF_DATASETS_CACHE) / "rap_lightning"
    folder = root / key_of(
        rules, [fingerprint(source, split), source.path, split, repr(source), __version__, str(FORMAT)]
    )
    if not (folder / "report.json").is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        except OSError as error:
            raise cache_unusable(error) or error from error
        try:
            report = DataReport(source.path, split)
            write_pairs(work / "pairs.arrow", read_pairs(source, split, rules, report, num_proc=num_proc))
            (work / "report.json").write_text(json.dumps(report.as_dict()), encoding="utf-8")
            try:
                work.rename(folder)
            except OSError:
                if not (folder / "report.json").is_file():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    stored = datasets.Dataset.from_file(str(folder / "pairs.arrow"))
    table = datasets.Dataset(stored.data, fingerprint=folder.name)  # or each start would have another fingerprint
    return table, DataReport.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def write_pairs(path: Path, pairs: Iterable[Pair], rows: int = 1000) -> None:
    """Write pairs to an Arrow stream file."""
    import pyarrow as pa

    layout = schema()
    remaining = iter(pairs)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, layout) as writer:
        while part := list(islice(remaining, rows)):
            stored = [vars(pair) | {"history": json.dumps(pair.history, ensure_ascii=False)} for pair in part]
            writer.write_batch(pa.RecordBatch.from_pylist(stored, schema=layout))


def schema() -> Any:
    """Return the columns of a stored pair; the history is JSON, because turns differ in their keys."""
    import pyarrow as pa

    text, flag, numbers = pa.string(), pa.bool_(), pa.list_(pa.float64())
    return pa.schema(
        {
            "id": text, "history": text, "responses": pa.list_(text), "rewards": numbers,
            "attributes": pa.list_(numbers), "tools": text, "exchanged": flag, "tie": flag, "place": text,
            "weight": pa.float64(),
        }
    )  # fmt: skip


def as_pair(row: dict[str, Any]) -> Pair:
    """Return the pair of a stored row."""
    high, low = row["attributes"]
    return Pair(
        **row
        | {
            "history": tuple(json.loads(row["history"])),
            "responses": tuple(row["responses"]),
            "rewards": tuple(row["rewards"]),
            "attributes": (tuple(high), tuple(low)),
        }
    )


def draw_pairs(tables: Iterable[Any], limit: int, seed: int) -> list[Pair]:
    """At most ``limit`` pairs of tables, drawn by the seed and their content alone, in the order of the tables."""
    found: dict[str, Pair] = {}
    for table in tables:
        ids = table.select_columns(["id"])[:]["id"]
        first = {one: row for row, one in reversed(list(enumerate(ids)))}
        drawn = sorted(first, key=lambda one: hash_text(f"{seed} {one}"))[:limit]
        found |= {one: as_pair(table[first[one]]) for one in sorted(drawn, key=first.__getitem__)}
    kept = set(sorted(found, key=lambda one: hash_text(f"{seed} {one}"))[:limit])
    return [pair for one, pair in found.items() if one in kept]
