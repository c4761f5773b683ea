"""Read files into chunks of rows, each row with its place. Damaged files are detected here, at the line.

Nothing is guessed: bytes that are not UTF-8, a line that is not a JSON object, and a truncated file are reported with
their place. ``datasets.load_dataset("json")`` reads most such files silently, or fails without a line number. Parquet
and Arrow files are read by pyarrow, and validated.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from rap_lightning.errors import DataError
from rap_lightning.preferences.bounded_json import TooDeep, load_json
from rap_lightning.preferences.pairs import BadRow, shown

ROWS = 1000  # in a chunk
CHUNK_BYTES = 2**24  # of lines in a chunk
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
MAGIC = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file"}


OF_TOOLS = re.compile(r"\b(tools|tool_calls|function|parameters|arguments): (list|struct|large_list)")
"""Columns that hold tools or calls, by the names in their Arrow type."""

ParsedRow = dict[str, Any] | BadRow
"""A row, or why it can't be read."""


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of a file, not parsed yet, so that another process can do that.

    Attributes:
        name: of the file, for messages.
        first: number of the first line or row, from 1.
        payload: lines as bytes, a list of rows, or an Arrow record batch.
        unit: what is numbered: ``line`` or ``row``.
    """

    name: str
    first: int
    payload: Any
    unit: str = "row"

    def place(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"

    def rows(self) -> Iterator[tuple[int, ParsedRow]]:
        """Yield (number, row), with a BadRow for a row that can't be read. Blank lines are skipped."""
        if self.unit == "line":
            for number, line in enumerate(self.payload, self.first):
                if line.strip():
                    yield number, parse_line(line, number)
            return
        values = self.payload if isinstance(self.payload, list) else unpadded(self.payload)
        for number, value in enumerate(values, self.first):
            yield number, as_object(value)

    def head(self, count: int) -> Chunk:
        part = self.payload[:count] if isinstance(self.payload, list) else self.payload.slice(0, count)
        return replace(self, payload=part)


def unpadded(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a record batch, with tools and calls as they were before Arrow stored them.

    In Arrow all structs of a column have the same fields: what one tool or call has not is null in it. Those nulls are
    left out. A null in a list is the data's own, and so is a ``default`` of null where the type allows it.
    """
    padded = [field.name for field in batch.schema if OF_TOOLS.search(f"{field.name}: {field.type}")]
    rows: list[dict[str, Any]] = batch.to_pylist()
    for row in rows if padded else ():
        row |= {name: _without_nulls(row[name]) for name in padded}
    return rows


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if "default" in value and value["default"] is None and _nullable(kept):
        kept["default"] = None
    return kept


def _nullable(schema: dict[str, Any]) -> bool:
    """Return whether a JSON schema allows null."""
    kinds = schema.get("type")
    options = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return (
        bool(schema.get("nullable")) or kinds == "null" or (isinstance(kinds, list) and "null" in kinds)
        or any(isinstance(one, dict) and _nullable(one) for one in options)
    )  # fmt: skip


class RepeatedKey(ValueError):
    """A JSON object gives a key twice; the JSON module would take the last one."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(next(name for name in names if names.count(name) > 1))
    return found


JSON = json.JSONDecoder(strict=False, object_pairs_hook=_unique)
"""It accepts unescaped control characters inside a string."""


def parse_line(line: bytes, number: int) -> ParsedRow:
    """Parse a line of a JSON Lines file."""
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    try:
        return as_object(load_json(line.decode("utf-8"), JSON.decode))
    except UnicodeDecodeError as error:
        reason = "bytes that are not UTF-8"
        return BadRow(f"byte {error.start + 1}", reason, line[error.start : error.end], stops=True)
    except json.JSONDecodeError as error:
        where = f"character {error.colno}"
        if error.msg == "Extra data":
            return BadRow(where, "more than one JSON value on the line", error.doc[error.pos :], stops=True)
        if number == 1 and line.strip() in (b"[", b"{"):
            reason = (
                "one JSON document over several lines, not an object per line (a .json file may hold an array of them)"
            )
            return BadRow(where, reason, stops=True)
        return BadRow(where, f"not JSON ({error.msg.lower()}); is the file truncated?", stops=True)
    except TooDeep:
        return BadRow("row", "JSON nested too deeply to be read", stops=True)
    except RepeatedKey as error:
        return BadRow(str(error), "a key that is given twice")
    except ValueError as error:  # a number with more digits than Python converts, say
        return BadRow("row", f"JSON that can't be read ({type(error).__name__})", stops=True)


def as_object(value: Any) -> ParsedRow:
    """Return a row, or a BadRow if the value is not an object; null is an empty row, which is dropped."""
    if isinstance(value, dict):
        return value
    if value is None:
        return BadRow("row", "null instead of an object")
    kind = {list: "an array", str: "text", bool: "true or false"}.get(type(value), "a number")
    return BadRow("row", f"{kind} instead of an object", value, stops=True)


def read_file(path: str, label: str | None = None) -> Iterator[Chunk]:
    """Yield the chunks of one local file."""
    label = label or Path(path).name
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet(path, label)
    elif kind == "arrow":
        yield from _arrow(path, label)
    elif kind == "json":
        yield from _json(path, label)
    else:
        raise DataError(f"{path}: expected a file ending in .parquet, .arrow, .jsonl or .json (text also compressed).")


def kind_of(path: str) -> str | None:
    """Return the kind of a file by its suffix: parquet, arrow, json, or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".ndjson": "json"}.get(last)


def _json(path: str, label: str) -> Iterator[Chunk]:
    try:
        with _open(path) as stream:
            head = stream.read(4096)
        _check_head(head, path)
        with _open(path) as stream:
            array = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            if array and ".json" in [suffix.lower() for suffix in Path(path).suffixes]:
                yield from _array(stream, label, path)
            else:
                yield from _lines(stream, label, path)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} can't be read: {type(error).__name__}: {error}. Is the file complete?") from error


def _open(path: str) -> Any:
    """Open a file for reading uncompressed bytes, line by line."""
    compression = COMPRESSIONS.get(Path(path).suffix.lower())
    if compression == "zstd":  # pyarrow detects a truncated stream, fsspec's reader does not
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    # not fsspec.open, which reads :: in a path as a chain of URLs
    openers: dict[str | None, Callable[..., Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return openers.get(compression, open)(path, "rb")


def _check_head(head: bytes, path: str) -> None:
    if not head:
        raise DataError(f"{path} is empty: 0 bytes.")
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"{path}: expected JSON lines, found the first bytes of {kind}. Rename it, or copy it again."
            )
    wide = head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) > 3 and b"\0" in head[:4])
    if wide:
        raise DataError(f"{path}: expected UTF-8, found UTF-16 or UTF-32. Convert it: iconv -f UTF-16 -t UTF-8")


def _lines(stream: BinaryIO, label: str, path: str) -> Iterator[Chunk]:
    lines: list[bytes] = []
    size, number, first, any_row = 0, 0, 1, False
    for number, line in enumerate(stream, 1):  # binary, so only \n ends a line: texts may contain U+2028
        lines.append(line)
        size += len(line)
        any_row = any_row or bool(line.strip())
        if len(lines) >= ROWS or size >= CHUNK_BYTES:
            yield Chunk(label, first, lines, "line")
            lines, size, first = [], 0, number + 1
    if not any_row:
        raise DataError(f"{path} has no rows: {number} blank lines.")
    if lines:
        yield Chunk(label, first, lines, "line")


def _array(stream: BinaryIO, label: str, path: str) -> Iterator[Chunk]:
    try:
        values = load_json(stream.read().decode("utf-8-sig"), JSON.decode)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg}). Is the file truncated?") from error
    except TooDeep as error:
        raise DataError(f"{path}: JSON nested too deeply to be read.") from error
    except RepeatedKey as error:
        raise DataError(f"{path}: an object gives the key {error} twice. Remove one.") from error
    if not isinstance(values, list) or not values:
        raise DataError(f"{path} has no rows.")
    for start in range(0, len(values), ROWS):
        yield Chunk(label, start + 1, values[start : start + ROWS])


def _parquet(path: str, label: str) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    failures = (pa.ArrowException, OSError)  # looked up now: at interpreter exit the generator closes without modules
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # pre-buffering would hold the whole file in memory
            if file.metadata.num_rows == 0:
                raise DataError(f"{path} has no rows.")
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path} has more than one column named {', '.join(twice)}.")
            yield from numbered(_valid(file.iter_batches(ROWS)), label)
    except failures as error:
        raise DataError(f"{path} can't be read as Parquet: {shown(str(error), 200)}. Is the file complete?") from error


def _arrow(path: str, label: str) -> Iterator[Chunk]:
    import pyarrow as pa

    failures = (pa.ArrowException, OSError)
    try:
        with pa.OSFile(path) as source:  # a memory-mapped file that is truncated would end the process with SIGBUS
            try:
                reader = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(source)
                reader = (table.get_batch(i) for i in range(table.num_record_batches))
            yield from numbered(_valid(reader), label)
    except failures as error:
        raise DataError(f"{path} can't be read as Arrow: {shown(str(error), 200)}. Is the file complete?") from error


def _valid(batches: Iterable[Any]) -> Iterator[Any]:
    """Validate record batches: pyarrow would otherwise follow wrong offsets out of bounds."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def numbered(batches: Iterable[Any], label: str) -> Iterator[Chunk]:
    """Yield record batches as chunks of at most ROWS rows."""
    first = 1
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            part = batch.slice(start, ROWS)
            yield Chunk(label, first, part)
            first += part.num_rows
    if first == 1:
        raise DataError(f"{label} has no rows.")
