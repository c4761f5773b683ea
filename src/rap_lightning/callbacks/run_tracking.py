"""The callback that starts trackers and sends them what a run is: hyperparameters, data report and goal scale."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rap_lightning.callbacks.run_folder import run_folder
from rap_lightning.callbacks.run_metadata import run_facts
from rap_lightning.callbacks.trackers import BY_NAME, Continued, Tracker, tracker_of
from rap_lightning.errors import ConfigError, first_line
from rap_lightning.provenance import flatten, mask_text, masked_arguments
from rap_lightning.training.guarded_loggers import guarded

COUNTS = ("dropped", "repaired", "truncated", "left_out")


class RunTracking(pl.Callback):
    """Adds the loggers of ``--track``, and tells every logger what the run is.

    Rank zero alone has these loggers; it alone logs.

    Args:
        names: of trackers.
        hyperparameters: flat values by option, without secrets.
        continued: the tracked runs of the run that is resumed.
    """

    def __init__(self, names: Sequence[str], hyperparameters: dict[str, Any], continued: Continued) -> None:
        self._names, self._hyperparameters, self._continued = names, hyperparameters, continued

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the trackers, once.

        Raises:
            ConfigError: one can't be started.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names, self._names = self._names, ()
        folder = run_folder(trainer)
        trainer.loggers = [*trainer.loggers, *(self._start(BY_NAME[name], folder) for name in names)]
        for logger in trainer.loggers:
            tracker = tracker_of(logger)
            with _starting(type(logger).__name__ if tracker is None else tracker.name):
                _log_hyperparameters(logger, self._hyperparameters)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the data report and the goal's scale, which are known now."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        facts = run_facts(trainer, pl_module)
        splits = (facts.get("data") or {}).get("splits", [])
        rows = [[one["split"], one["source"], *row] for one in splits for row in _counts(one)]
        goal = facts.get("goal") or {}
        values = flatten({"goal": {name: goal[name] for name in ("scale", "template", "best") if name in goal}})
        several = len(splits) > len({one["split"] for one in splits})
        for number, one in enumerate(splits):
            at = f"data_report.{one['split']}{f'.{number}' if several else ''}"
            values |= {f"{at}.{name}": value for name, value in one.items() if isinstance(value, int)}
        for logger in trainer.loggers:
            _log_hyperparameters(logger, values)
        log_table(trainer, "data_report", ("split", "source", "what", "reason", "count"), rows)

    def _start(self, tracker: Tracker, folder: Path) -> Logger:
        folder.mkdir(parents=True, exist_ok=True)
        name = "/".join(folder.resolve().parts[-2:])
        options = tracker.options(folder, name) | self._continued.take(tracker)
        with _starting(tracker.name):
            logger = tracker.kind(**options)
            assert logger.version is not None or logger.experiment is not None  # type: ignore[attr-defined]
        return logger


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """A failure to start is the user's to resolve, before the first step; later ones end no run (guarded_loggers).

    W&B and Comet record the command line, which they read from ``sys.argv`` when they start and have no option for: it
    has no keys meanwhile.
    """
    argv = sys.argv
    sys.argv = [*argv[:1], *masked_arguments(argv[1:])]
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # trackers raise errors of several libraries
        raise ConfigError(
            f"{name} can't start: {type(error).__name__}: {mask_text(first_line(error))}. Check its login and address "
            "(docs/tracking.md), or leave it out: metrics.csv is written without it."
        ) from error
    finally:
        sys.argv = argv


def _log_hyperparameters(logger: Logger, values: Mapping[str, Any]) -> None:
    plain = (bool, int, float, str)
    shown = {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}
    if not shown:
        return
    tracker = tracker_of(logger)
    if tracker is None:
        logger.log_hyperparams(shown)
    else:
        tracker.log_hyperparameters(logger, shown)


def _counts(split: Mapping[str, Any]) -> list[list[Any]]:
    """Return (what, reason, count) for each count of a split's data report."""
    rows: list[list[Any]] = [[name, "", value] for name, value in split.items() if isinstance(value, int)]
    for what in COUNTS:
        rows += [[what, reason, count] for reason, count in (split.get(what) or {}).items()]
    return rows


def log_table(trainer: pl.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Send a table to every tracker of a run that takes tables; in rank zero."""
    for logger in trainer.loggers if rows else ():
        if (tracker := tracker_of(logger)) is not None:
            with guarded(logger):
                tracker.log_table(logger, name, columns, rows, trainer.global_step)


def log_folder(trainer: pl.Trainer, folder: Path) -> None:
    """Send a folder to every tracker of a run that takes files, and report each that fails; in rank zero."""
    for logger in trainer.loggers:
        if (tracker := tracker_of(logger)) is not None and tracker.takes_folders:
            try:
                tracker.log_folder(logger, folder)
            except Exception as error:  # trackers raise errors of several libraries
                reason = f"{type(error).__name__}: {mask_text(first_line(error))}"
                rank_zero_warn(f"{folder} was not sent to {tracker.name}: {reason}")
            else:
                rank_zero_info(f"sent {folder} to {tracker.name}")
