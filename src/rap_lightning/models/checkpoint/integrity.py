"""Checkpoints that are written whole or not at all, and compared with their checksums before they are read.

A checkpoint needs no digest of ours. ``torch.save`` writes a zip archive with a CRC-32 of every record, which
``torch.load`` doesn't look at and :func:`verify` does (``unzip -t FILE`` does the same). It takes half the time of a
SHA-256, costs nothing while saving, and can't be separated from the file. Shards of FSDP2 are such archives one after
another; only torch's index of them is a bare pickle, whose CRC-32 is written beside it.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch

from rap_lightning.atomic_write import atomic_file
from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.sharded_folder import INDEX, LATEST, read_entry, read_index
from rap_lightning.progress_bar import progress

CHUNK = 1 << 22
SHOWN_FROM = 2_000_000_000
"""Bytes from which reading takes long enough for a progress bar."""
INDEX_CHECKSUM = ".metadata.crc32"
_verified: set[tuple[str, int, int]] = set()


def write_whole(content: Any, path: Path) -> None:
    """Write what ``torch.save`` takes, whole or not at all.

    Raises:
        OSError: for example, the disk is full; a file that was at ``path`` before is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "wb", partial=partial_of(path)) as file:
        _save(content, file)
    _sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Return the name under which a checkpoint is written until it is complete; a later write replaces a leftover."""
    return path.with_name(f".{path.name}.partial")


def mark_incomplete(folder: Path) -> None:
    """Remove the index of a sharded checkpoint that is about to be overwritten: old and new shards must not mix."""
    for name in (INDEX_CHECKSUM, INDEX, LATEST):
        (folder / name).unlink(missing_ok=True)


def write_index_checksum(folder: Path) -> None:
    """Write the checksum of a sharded checkpoint's index beside it; DeepSpeed's checkpoints have no index."""
    if (folder / INDEX).is_file():
        with atomic_file(folder / INDEX_CHECKSUM) as file:
            file.write(f"{zlib.crc32((folder / INDEX).read_bytes()):08x}\n")


def verify(path: Path) -> bool:
    """Compare a checkpoint, a file or a folder, with its checksums.

    Returns:
        False where it has none: written after ``torch.serialization.set_crc32_options(False)``, or an FSDP2 folder that
        another program wrote.

    Raises:
        ConfigError: it is cut off, or has changed since it was written.
    """
    return _verify_folder(path) if path.is_dir() else _verify_file(path)


def _verify_folder(folder: Path) -> bool:
    known = True
    for path in sorted(folder.rglob("*.pt")):  # meta.pt of Lightning; with DeepSpeed every file
        known &= _verify_file(path)
    if not (folder / INDEX).is_file():
        return known
    checksum = folder / INDEX_CHECKSUM
    if checksum.is_file():
        try:
            same = int(checksum.read_text(), 16) == zlib.crc32((folder / INDEX).read_bytes())
        except ValueError:
            same = False
        if not same:
            raise _damaged(folder, f"{INDEX} is not what was written")
    for item in sorted(read_index(folder).storage_data.values(), key=lambda item: (item.relative_path, item.offset)):
        known &= _verify_archive(io.BytesIO(read_entry(folder, item)), folder / item.relative_path)
    return known and checksum.is_file()


def _verify_file(path: Path) -> bool:
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key in _verified:  # the command line verifies before it loads anything, and the trainer verifies again
        return True
    with path.open("rb") as file:
        known = _verify_archive(file, path)
    if known:
        _verified.add(key)
    return known


def _verify_archive(file: IO[bytes], path: Path) -> bool:
    """Read every record of an archive; the zip reader raises where one doesn't have its CRC-32."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                return False
            size = sum(record.file_size for record in records)
            with progress(
                total=size, desc=f"verifying {path.name}", unit="B", unit_scale=True, disable=size < SHOWN_FROM,
                leave=False,
            ) as bar:  # fmt: skip
                for record in records:
                    with archive.open(record) as content:
                        while chunk := content.read(CHUNK):
                            bar.update(len(chunk))
    except Exception as error:  # a damaged archive fails with any type of error
        raise _damaged(path, "its content is not what was written") from error
    return True


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is refused: {why}. It was damaged after it had been written (a disk, a copy that was cut off). Resume "
        "from another checkpoint, or copy this one again."
    )


class _RecordingFile:
    """Keep the error of a failed write: torch's writer raises a RuntimeError without the reason instead of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def _save(content: Any, file: IO[bytes]) -> None:
    recording = _RecordingFile(file)
    try:
        torch.save(content, recording)  # type: ignore[arg-type]
    except Exception as error:
        if recording.error is not None:
            raise recording.error from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut too; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
