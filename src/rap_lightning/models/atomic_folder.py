"""Writing a folder all or nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rap_lightning.errors import ConfigError


@contextmanager
def all_or_nothing(output: Path, needed: int = 0) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place when the block ends well, and goes when it doesn't.

    Args:
        output: a folder that doesn't exist yet, or is empty.
        needed: bytes that will be written, to be refused early where the disk has not so much room.

    Raises:
        ConfigError: something stands at ``output``, or it can't be written there: no permission, no room.
    """
    refuse_non_empty(output)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(output.parent).free
        if room < needed:
            raise ConfigError(
                f"{output}: {_size(needed)} would be written, and its disk has {_size(room)} left. Make room, or name "
                "another place."
            )
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            path.chmod(partial.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
        refuse_non_empty(output)  # someone else may have been faster
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
    """Raise ConfigError where a file, or a folder with something in it, stands at ``output``."""
    try:
        taken = not output.is_dir() or any(output.iterdir()) if os.path.lexists(output) else False
    except OSError as error:
        raise ConfigError(f"{output} can't be looked into: {error.strerror}.") from error
    if taken:
        raise ConfigError(f"{output} exists and is not empty. Name another folder, or remove it.")


def _reason(error: Exception) -> str | None:
    """Why the system refused to write; None for an error that isn't about that."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not isinstance(error, ConfigError):
        # safetensors and tokenizers write in Rust, whose errors (a bare Exception is one) say it in words
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number is None:
        return None
    name = f" ({error.filename})" if isinstance(error, OSError) and error.filename and number != errno.ENOSPC else ""
    return os.strerror(number) + name


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
