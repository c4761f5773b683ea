"""Write files and folders all or nothing: under another name beside their own, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rap_lightning.errors import ConfigError


@contextmanager
def atomic_file(
    path: Path, mode: str = "w", *, partial: Path | None = None, errors: str | None = None
) -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` when the block succeeds, and is removed when it fails.

    Args:
        path: what was there before stays until then.
        mode: for text (UTF-8) or bytes.
        partial: the other name; by default one of this process, so that several may write the same file.
        errors: how ``open`` handles text that UTF-8 can't encode.
    """
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _open_new(partial, mode, errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def appending(path: Path) -> Iterator[None]:
    """Leave a file as it was when the block, which appends to it, can't write: no half line, and no empty new file."""
    size = path.stat().st_size if path.is_file() else None
    try:
        yield
    except OSError:
        if size is None:
            path.unlink(missing_ok=True)
        elif path.is_file():
            os.truncate(path, size)
        raise


def _open_new(path: Path, mode: str, errors: str | None) -> IO[Any]:
    """Open a file that nobody else has made: in a shared folder, a link of that name could lead anywhere."""
    path.unlink(missing_ok=True)  # what a killed process left
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    text = "b" not in mode
    return os.fdopen(os.open(path, flags, 0o666), mode, encoding="utf-8" if text else None, errors=errors)


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Provide a folder beside ``output`` that is renamed to it when the block succeeds, and removed when it fails.

    Args:
        output: a folder that doesn't exist yet, or is empty.

    Raises:
        ConfigError: ``output`` is not empty, or can't be written: no permission, no room.
    """
    refuse_non_empty(output)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):  # safetensors makes files that only their owner may read
            path.chmod(partial.stat().st_mode & (0o777 if path.is_dir() else 0o666))
        refuse_non_empty(output)  # another process may have written it meanwhile
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (reason := _reason(error)) is None:
            raise
        raise ConfigError(f"{output} can't be written: {reason}. Nothing was left there.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_non_empty(output: Path) -> None:
    """Raise ConfigError where ``output`` is a file, or a folder that isn't empty."""
    try:
        taken = not output.is_dir() or any(output.iterdir()) if os.path.lexists(output) else False
    except OSError as error:
        raise ConfigError(f"{output} can't be read: {error.strerror}.") from error
    if taken:
        raise ConfigError(f"{output} exists and is not empty. Name another folder, or remove it.")


def _reason(error: Exception) -> str | None:
    """Return why the system refused to write; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, ConfigError):
        # safetensors and tokenizers write in Rust: their errors (some are a bare Exception) have the number in the text
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number is None:
        return None
    name = f" ({error.filename})" if isinstance(error, OSError) and error.filename and number != errno.ENOSPC else ""
    return os.strerror(number) + name
