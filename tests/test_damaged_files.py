"""Files that mutated input has broken the readers with: each ends in words."""

import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import scored_rows, write_jsonl
from rap_lightning.batches.loader import unwrap_worker_error
from rap_lightning.errors import DataError
from rap_lightning.preferences.pairs import BadRow
from rap_lightning.preferences.readers import read_file


def rows_of(path: Path) -> list[Any]:
    return [row for chunk in read_file(str(path)) for _, row in chunk.rows()]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_an_arrow_file_that_is_cut_off_anywhere_is_named(new: Any, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(scored_rows(200))
    whole = tmp_path / "whole.arrow"
    with new(str(whole), table.schema) as writer:
        writer.write_table(table)
    assert len(rows_of(whole)) == 200
    content, path = whole.read_bytes(), tmp_path / "cut.arrow"
    for length in random.Random(0).sample(range(8, len(content) - 16), 40):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut\.arrow"):
            rows_of(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_text_that_is_no_utf_8_in_a_column_is_named(suffix: str, tmp_path: Path) -> None:
    offsets, data = pa.array([0, 3, 6], pa.int32()).buffers()[1], pa.py_buffer(b"abc\x97\x98\x99")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    table, path = pa.table({"prompt": broken}), tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"rows\{suffix} can't be read.*UTF8"):
        rows_of(path)


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    content = bytearray(gzip.compress(write_jsonl(tmp_path / "rows.jsonl", scored_rows(50)).read_bytes()))
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.sample(range(20, len(content) - 20), 3):
            damaged[place] ^= 255
        path.write_bytes(damaged)
        try:
            assert any(isinstance(row, BadRow) for row in rows_of(path)), "what was read without a word must be damaged"
        except DataError as error:
            assert "rows.jsonl.gz" in str(error)  # noqa: PT017


def test_a_workers_error_of_ours_is_raised_with_its_own_text() -> None:
    def batches(text: str) -> Any:
        raise DataError(text)
        yield

    around = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
        "rap_lightning.errors.DataError: train.jsonl line 3: what is wrong\n"
    )
    with pytest.raises(DataError, match=r"^train\.jsonl line 3: what is wrong$"):
        list(unwrap_worker_error(batches(around)))
    with pytest.raises(DataError, match=r"^another$"):
        list(unwrap_worker_error(batches("another")))
