"""JSON lines that survive a killed process: what is finished is on disk, and the next run does the rest.

A :class:`Ledger` appends rows and syncs them to disk. ``NAME.meta.json`` beside the file holds the settings that the
rows were made with; a run with other settings is refused. Several processes write shards (:func:`shard_path`), each its
own file, and know each other's finished rows. The functions below read and write such files.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any

from rap_lightning.atomic_write import atomic_file
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.bounded_json import load_json
from rap_lightning.preferences.pairs import shown

Row = dict[str, Any]
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def digest_of(*parts: Any) -> str:
    """Return 24 hex digits for plain values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """Return 24 hex digits for a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def shard_path(path: Path, shard: int, shards: int) -> Path:
    """Return the file of one of several processes; ``path`` itself for a single process."""
    return path if shards == 1 else path.with_name(f"{path.stem}-{shard:05d}-of-{shards:05d}{path.suffix}")


def parts_of(path: Path) -> list[Path]:
    """Return the files written for ``path``: itself, and shards of any number of processes."""
    found = [path] if path.is_file() else []
    for other in sorted(path.parent.glob(f"{glob.escape(path.stem)}-*{path.suffix}")):
        stem = other.name.removesuffix(path.suffix)
        if SHARD.search(stem) and SHARD.sub("", stem) == path.stem:
            found.append(other)
    return found


def plain_values(value: Any) -> Any:
    """Return a value as it reads after a round trip through JSON, so that it compares with a stored one."""
    return json.loads(json.dumps(value))


def meta_path(path: Path) -> Path:
    """Return the file that holds the settings of ``path``."""
    return path.with_name(path.name + ".meta.json")


def read_meta(path: Path) -> dict[str, Any]:
    """Read the record beside a file of rows; empty if there is none."""
    record = meta_path(path)
    try:
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{record} is not JSON: {error}. It holds the settings of {path.name}.") from error
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that exists completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON document atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines atomically."""
    write_atomically(path, "".join(line_of(row) for row in rows))


def list_failed(path: Path, rows: Sequence[Row]) -> str:
    """Write the rows that failed to ``NAME.failed.jsonl`` beside a file, or remove an old list; return its name."""
    listing = path.with_name(path.name + ".failed.jsonl")
    if rows:
        write_lines(listing, rows)
    else:
        listing.unlink(missing_ok=True)
    return listing.name


def line_of(row: Row) -> str:
    """Return a row as its line."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(paths: Sequence[Path], *, torn: bool = False) -> Iterator[Row]:
    """Read the rows of files; with ``torn``, without an incomplete last line, which another process may be writing."""
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = load_json(line)
                except ValueError as error:
                    if torn and not line.endswith(b"\n"):
                        return
                    raise DataError(
                        f"{path} line {number}: not JSON ({error}), found {shown(line.decode('utf-8', 'replace'))}. "
                        "If a process was killed while it wrote this file, run its command again to repair it."
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number}: expected an object, found {shown(line.decode())}.")
                yield row


class Ledger:
    """Finished rows, with a way to append more. Used as a context manager.

    Args:
        path: JSON lines; each row has an ``id``.
        settings: plain values of everything that changes the rows.
        notes: further facts for the record beside the file; they may change between runs.

    Attributes:
        done: ids of the finished rows in the files of all shards.

    Raises:
        ConfigError: another process is writing the file, or it was made with other settings.
        DataError: a line in the middle of the file is not a row.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], notes: dict[str, Any] | None = None, shard: int = 0, shards: int = 1
    ) -> None:
        self.base, self.path = path, shard_path(path, shard, shards)
        self.settings: dict[str, Any] = plain_values(settings)
        self.notes = notes or {}
        self.done: set[str] = set()
        self._file: IO[bytes]

    def __enter__(self) -> Ledger:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
        except OSError as error:
            raise ConfigError(f"{self.path} can't be written: {error.strerror}.") from error
        new = False
        try:
            self._lock()
            new = not self.path.stat().st_size and not meta_path(self.path).is_file()
            if new:  # before looking at the others: of two shards that start at once, one sees the other's record
                self._write_record()
            others = [part for part in parts_of(self.base) if part != self.path]
            for part in others if new else [self.path, *others]:
                self._check_settings(part)
            self._repair_last_line()
            self._read_own()
            self.done.update(str(row.get("id")) for row in read_rows(others, torn=True))
        except BaseException:
            self._file.close()
            if new:
                meta_path(self.path).unlink(missing_ok=True)
            raise
        if not new:
            self._write_record()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows and sync them to disk."""
        self._write("".join(map(line_of, rows)).encode("utf-8", "surrogatepass"))
        self.done.update(str(row["id"]) for row in rows)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{self.path} is being written by another process. Wait for it, or name another."
            ) from error

    def _write_record(self) -> None:
        write_json(meta_path(self.path), {"settings": self.settings, **self.notes})

    def _check_settings(self, part: Path) -> None:
        found = read_meta(part).get("settings")
        if found is None and part != self.path and not part.stat().st_size:
            return  # created a moment ago; its process will see our record
        if found is None:
            raise ConfigError(
                f"{part} exists, and no record beside it says how it was made. Name another output, or remove it."
            )
        if found != self.settings:
            changed = "; ".join(
                f"{key}: {shown(found.get(key), 200)} there, {shown(self.settings.get(key), 200)} now"
                for key in sorted({*found, *self.settings})
                if found.get(key) != self.settings.get(key)
            )
            raise ConfigError(
                f"{part} was made with other settings, and one file never mixes them. {changed}. Name another output, "
                "or remove the old one."
            )

    def _repair_last_line(self) -> None:
        """Complete or remove a last line without a newline, which a killed process left."""
        if not self.path.stat().st_size:
            return
        with self.path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        if not tail:
            return
        try:
            complete = isinstance(load_json(tail), dict)
        except ValueError:
            complete = False
        if complete:
            self._write(b"\n")
        else:
            os.truncate(self.path, start)
            print(f"{self.path.name}: the last line was cut off ({len(tail)} bytes): removed, its row is made again")

    def _read_own(self) -> None:
        for row in read_rows([self.path]):
            if not isinstance(row.get("id"), str):
                raise DataError(
                    f"{self.path} holds a row without an id, found {shown(json.dumps(row))}. Name another file."
                )
            if row["id"] in self.done:
                raise DataError(f"{self.path} holds the row {row['id']} twice. Remove one of the two.")
            self.done.add(row["id"])
