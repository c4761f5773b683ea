"""Loggers whose failures end no run: a full disk, a tracker that can't be reached.

Lightning calls loggers from many places, also while it handles an exception, where an error of a logger would take the
place of the first one. ``guard_loggers`` therefore wraps the methods of each logger. The first failure of each is
reported, and lines that were not written are counted. Lines for metrics.csv are kept in memory and written as soon as
there is room.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from rap_lightning.atomic_write import appending, atomic_file
from rap_lightning.errors import first_line
from rap_lightning.provenance import mask_text

METHODS = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")
"""What Lightning and the callbacks call on a logger during a run."""


@dataclass
class _Failures:
    lines: int = 0
    told: bool = False


_FAILURES: WeakKeyDictionary[Logger, _Failures] = WeakKeyDictionary()


def guard_loggers(loggers: Iterable[Logger]) -> None:
    """Wrap the methods of loggers, each once."""
    for logger in loggers:
        if logger in _FAILURES:
            continue
        _FAILURES[logger] = _Failures()
        if isinstance(logger, CSVLogger) and "://" not in str(logger.save_dir):
            logger.save = _saves_whole_lines(logger, logger.save)  # type: ignore[method-assign]
        for name in METHODS:
            setattr(logger, name, _guarded_method(logger, name))


def lines_lost(loggers: Iterable[Logger]) -> dict[str, int]:
    """Return how many log lines each logger has not written; without those that have written all."""
    lost: dict[str, int] = {}
    for logger in loggers:
        lines = _FAILURES[logger].lines if logger in _FAILURES else 0
        if lines and isinstance(logger, CSVLogger):  # they are written later, and only those still waiting are missing
            lines = len(logger.experiment.metrics)
        if lines:
            lost[type(logger).__name__] = lost.get(type(logger).__name__, 0) + lines
    return lost


@contextmanager
def guarded(logger: Logger, *, lines: int = 1) -> Iterator[None]:
    """Report a failure of the block for the first time, count it, and continue."""
    failures = _FAILURES.setdefault(logger, _Failures())
    try:
        yield
    except Exception as error:  # trackers raise errors of several libraries
        failures.lines += lines
        if not failures.told:
            failures.told = True
            later = " Its lines are kept and written when that works again." if isinstance(logger, CSVLogger) else ""
            rank_zero_warn(
                f"{type(logger).__name__} can't log: {type(error).__name__}: {mask_text(first_line(error))}. "
                f"Training continues; this is reported once, and missing lines are counted in run.json.{later}"
            )


def _guarded_method(logger: Logger, name: str) -> Callable[..., None]:
    method = getattr(logger, name)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> None:
        with guarded(logger, lines=int(name == "log_metrics" or isinstance(logger, CSVLogger))):
            method(*args, **kwargs)
        if name == "finalize" and (lost := lines_lost([logger])):
            rank_zero_warn(f"{type(logger).__name__}: {sum(lost.values()):,} log lines were not written.")

    return call


def _saves_whole_lines(logger: CSVLogger, save: Callable[[], None]) -> Callable[[], None]:
    """Save metrics.csv so that a full disk loses nothing that was written.

    Lightning 2.6.6 empties the file before it writes it again with a wider header, and leaves half a line where it
    can't write one.
    """

    @wraps(save)
    @rank_zero_only  # other ranks have no writer
    def call() -> None:
        writer: Any = logger.experiment
        if not writer.metrics:
            return
        path = Path(writer.metrics_file_path)
        new = sorted({name for line in writer.metrics for name in line} - set(writer.metrics_keys))
        if new and path.is_file():
            header = sorted([*writer.metrics_keys, *new])
            _write_with_header(path, header)
            writer.metrics_keys = header
        with appending(path):
            save()

    return call


def _write_with_header(path: Path, header: list[str]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=header)
    writer.writeheader()
    writer.writerows(lines)
    with atomic_file(path, "wb") as file:
        file.write(text.getvalue().encode())
