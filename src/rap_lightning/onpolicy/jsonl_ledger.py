"""Finished work as json lines that survive whatever ends the process.

Rows are appended a chunk at a time and synced to disk. What a killed process left of its last line is taken away, and
said. A file beside, ``NAME.meta.json``, holds the settings that the rows were made with: a run with other settings does
not go on in the same file. One process writes a file at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.pairs import shown

Row = dict[str, Any]
LONGEST_LINE = 1 << 26  # bytes
SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def digest_of(*parts: Any) -> str:
    """24 hex digits of plain values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """24 hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def shard_path(path: Path, shard: int, shards: int) -> Path:
    """The file of one of several processes; of a single one, ``path`` itself."""
    return path if shards == 1 else path.with_name(f"{path.stem}-{shard:05d}-of-{shards:05d}{path.suffix}")


def parts_of(path: Path) -> list[Path]:
    """The files that were written for ``path``: itself, and shards of any number of processes."""
    found = [path] if path.is_file() else []
    for other in sorted(path.parent.glob(f"{glob_escape(path.stem)}-*{path.suffix}")):
        stem = other.name.removesuffix(path.suffix)
        if SHARD.search(stem) and SHARD.sub("", stem) == path.stem:
            found.append(other)
    return found


def glob_escape(text: str) -> str:
    """The text with everything escaped that a glob would read as a pattern."""
    return re.sub(r"([*?[])", r"[\1]", text)


def meta_path(path: Path) -> Path:
    """Where the settings of ``path`` stand."""
    return path.with_name(path.name + ".meta.json")


def read_meta(path: Path) -> dict[str, Any]:
    """The record beside a file of rows; empty where there is none."""
    record = meta_path(path)
    try:
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(
            f"{record} is not JSON: {error}. It holds the settings that {path.name} was made with."
        ) from error
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """A JSON document for people and programs, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Json lines, whole or not at all."""
    write_whole(path, "".join(line_of(row) for row in rows))


def line_of(row: Row) -> str:
    """A row as its line."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(paths: Sequence[Path], *, torn: bool = False) -> Iterator[Row]:
    """The rows of finished files.

    Args:
        paths: from :func:`parts_of`.
        torn: pass over a last line that is cut off: another process may be writing it.

    Raises:
        DataError: a line that is no JSON object.
    """
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    if torn and not line.endswith(b"\n"):
                        return
                    raise DataError(
                        f"{path} line {number}: not JSON ({error}), found {shown(line.decode('utf-8', 'replace'))}. "
                        "A file cut off by a killed process is mended by running the command that wrote it again."
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number}: expected an object, found {shown(line.decode())}.")
                yield row


class Ledger:
    """The rows that are done, and a way to add more. Used as a context manager.

    Args:
        path: json lines; each row has an ``id``.
        settings: whatever changes the rows. Plain values.
        notes: goes into the record beside, and may change between runs.
        shard, shards: this process, and how many share the work.

    Attributes:
        done: ids of the rows that are there, in the files of all shards.

    Raises:
        ConfigError: the file is another process's at the moment, or was made with other settings.
        DataError: a line in the middle of the file is no row.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], notes: dict[str, Any] | None = None, shard: int = 0, shards: int = 1
    ) -> None:
        self.base, self.path = path, shard_path(path, shard, shards)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.notes = notes or {}
        self.done: set[str] = set()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Ledger:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
        except OSError as error:
            raise ConfigError(f"{self.path} can't be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"{self.path} is being written by another process. Wait for it, or name another."
            ) from error
        made_now = not self.path.stat().st_size and not meta_path(self.path).is_file()
        try:
            if not made_now:
                self._same_settings(self.path)
            else:  # before the others are looked at: of two shards that begin at once, one sees the other's record
                write_json(meta_path(self.path), self._record())
            for other in parts_of(self.base):
                if other != self.path:
                    self._same_settings(other)
            self._mend()
            for row in read_rows([self.path]):
                self._add(row, self.path)
            for other in parts_of(self.base):
                if other != self.path:
                    self.done.update(str(row.get("id")) for row in read_rows([other], torn=True))
        except BaseException:
            self._file.close()
            if made_now:
                meta_path(self.path).unlink(missing_ok=True)
            raise
        if not made_now:
            write_json(meta_path(self.path), self._record())
        return self

    def _record(self) -> dict[str, Any]:
        return {"settings": self.settings, **self.notes}

    def __exit__(self, *_: object) -> None:
        assert self._file is not None, "entered first"
        self._file.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows and sync them to disk."""
        assert self._file is not None, "entered first"
        self._file.write("".join(map(line_of, rows)).encode("utf-8", "surrogatepass"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(str(row["id"]) for row in rows)

    def _add(self, row: Row, path: Path) -> None:
        if not isinstance(row.get("id"), str):
            raise DataError(f"{path} holds a row without an id, found {shown(json.dumps(row))}. Name another file.")
        if row["id"] in self.done:
            raise DataError(f"{path} holds the row {row['id']} twice. Remove one of the two.")
        self.done.add(row["id"])

    def _same_settings(self, part: Path) -> None:
        found = read_meta(part).get("settings")
        if found is None and part != self.path and not part.stat().st_size:
            return  # opened a moment ago, and its process sees our record
        if found is None:
            raise ConfigError(
                f"{part} is there already, and no record beside it says how it was made. Name another output, "
                "or remove it."
            )
        if found != self.settings:
            keys = sorted({*found, *self.settings})
            changed = [
                f"{key}: {shown(found.get(key), 200)} there, {shown(self.settings.get(key), 200)} now"
                for key in keys if found.get(key) != self.settings.get(key)
            ]  # fmt: skip
            raise ConfigError(
                f"{part} was made with other settings, and one file never mixes them. {'; '.join(changed)}. "
                "Name another "
                "output, or remove the old one."
            )

    def _mend(self) -> None:
        """Take away what a killed process left of its last line, and say so."""
        assert self._file is not None, "entered first"
        size = self._file.seek(0, os.SEEK_END)
        if not size:
            return
        behind = max(0, size - LONGEST_LINE)
        self._file.seek(behind)
        start = behind + self._file.read().rfind(b"\n") + 1
        if start == size:
            return
        self._file.seek(start)
        tail = self._file.read()
        try:
            whole = isinstance(json.loads(tail), dict)
        except ValueError:
            whole = False
        if whole:
            self._file.write(b"\n")
        else:
            self._file.truncate(start)
            print(f"{self.path.name}: the last line was cut off ({len(tail)} bytes); taken away, and done again")
        self._file.flush()
        os.fsync(self._file.fileno())
