"""Checkpoint files that are whole or not there, and that know when a bit of them has changed.

A file is written under another name beside its own, and takes its place when it is complete. Its SHA-256 stands in the
comment of the zip archive that torch makes of a checkpoint: inside the file, so that the two can't be separated, and
where every reader of such files passes over it. ``unzip -z FILE`` shows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from rap_lightning.errors import ConfigError
from rap_lightning.progress_bar import progress

COMMENT = b"rap-lightning sha256 "
COMMENT_LENGTH = len(COMMENT) + 64
CHUNK = 1 << 22
SHOWN_FROM = 2_000_000_000
"""Bytes from which reading takes long enough for a progress bar."""
FOLDER_DIGESTS = "digests.json"
_verified: set[tuple[str, int, int]] = set()


def write_sealed(content: Any, path: Path) -> int:
    """Write what ``torch.save`` takes, whole or not at all; the number of bytes.

    Raises:
        OSError: the disk is full, say; what stood at ``path`` before still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            sink = _Sealing(file)
            _save(content, sink)
            sink.seal()
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return size


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written until it is complete; one that is left behind is written over the next time."""
    return path.with_name(f".{path.name}.partial")


def verify(path: Path) -> bool:
    """Whether a checkpoint has a digest; a file with one is read whole, and must agree with it.

    Raises:
        ConfigError: it is cut off, or has changed since it was written.
    """
    if path.is_dir():
        return _verify_folder(path)
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key in _verified:
        return True
    with path.open("rb") as file:
        if state.st_size < COMMENT_LENGTH + 2:
            return False
        file.seek(-COMMENT_LENGTH - 2, os.SEEK_END)
        length, comment = int.from_bytes(file.read(2), "little"), file.read()
        if not comment.startswith(COMMENT) or length != COMMENT_LENGTH:
            if comment.startswith(COMMENT) or _comment(path):
                raise _changed(path, "its digest is damaged")
            return False
        file.seek(0)
        found = _digest(file, state.st_size - COMMENT_LENGTH - 2, path.name)
    if found.encode() != comment.removeprefix(COMMENT):
        raise _changed(path, "its content is not what was written")
    _verified.add(key)
    return True


def folder_digests(folder: Path, part: int = 0, parts: int = 1) -> dict[str, str]:
    """Digests of every ``parts``-th file of a sharded checkpoint: ranks share the reading."""
    return {str(path.relative_to(folder)): _file_digest(path) for path in _files_of(folder)[part::parts]}


def seal_folder(folder: Path, digests: dict[str, str]) -> None:
    """Write the digests of a sharded checkpoint's files into it; one without them is not known to be complete."""
    partial = folder / f".{FOLDER_DIGESTS}.partial"
    partial.write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(folder / FOLDER_DIGESTS)


def unseal_folder(folder: Path) -> None:
    """Take the digests away before a sharded checkpoint is written over."""
    (folder / FOLDER_DIGESTS).unlink(missing_ok=True)


def _verify_folder(folder: Path) -> bool:
    if not (folder / FOLDER_DIGESTS).is_file():
        return False
    try:
        digests = json.loads((folder / FOLDER_DIGESTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _changed(folder, f"its {FOLDER_DIGESTS} can't be read") from error
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise _changed(folder, f"{name} is missing")
        if _file_digest(path) != digest:
            raise _changed(folder, f"{name} is not what was written")
    return True


def _files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and FOLDER_DIGESTS not in p.name)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size, path.name)


def _digest(file: IO[bytes], size: int, name: str) -> str:
    digest, left = hashlib.sha256(), size
    with progress(
        total=size, desc=f"verifying {name}", unit="B", unit_scale=True, disable=size < SHOWN_FROM, leave=False
    ) as bar:
        while left and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _comment(path: Path) -> bytes:
    """The comment of a zip archive; torch writes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except (zipfile.BadZipFile, OSError):
        return b""


def _changed(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is refused: {why}. It was damaged after it had been written (a disk, a copy that was cut off). Go on "
        "from another checkpoint, or fetch it again from where it was copied."
    )


class _Sealing:
    """A file that hashes what is written to it, all but the last two bytes: a zip archive's length of its comment."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.tail = file, hashlib.sha256(), b""
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self.digest.update(self.tail)
            self.digest.update(view[:-2])
            self.tail = bytes(view[-2:])
        else:
            whole = self.tail + bytes(view)
            self.digest.update(whole[:-2])
            self.tail = whole[-2:]
        try:
            return self.file.write(view)
        except OSError as error:
            self.problem = error  # torch's writer makes a RuntimeError without a reason of it
            raise

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        assert self.tail == b"\0\0", "torch wrote no archive, or one with a comment"
        self.file.seek(-2, os.SEEK_END)
        comment = COMMENT + self.digest.hexdigest().encode()
        self.file.write(len(comment).to_bytes(2, "little") + comment)


def _save(content: Any, sink: _Sealing) -> None:
    try:
        torch.save(content, sink)  # type: ignore[arg-type]
    except Exception as error:
        if sink.problem is not None:
            raise sink.problem from error
        raise


def _sync_folder(folder: Path) -> None:
    """So that the new name, too, outlives a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
