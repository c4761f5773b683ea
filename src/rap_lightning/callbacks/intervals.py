"""Measurements of the policy every N optimizer steps during fit, as JSON lines that a resumed run continues."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.atomic_write import appending, atomic_file
from rap_lightning.callbacks.goal_sampling import log_now
from rap_lightning.callbacks.run_folder import run_folder, written_or_warned
from rap_lightning.errors import ConfigError
from rap_lightning.module import PreferenceModule
from rap_lightning.training.run_state import ends_step

Row = dict[str, Any]


class AtIntervals(pl.Callback):
    """Measures before the first step, after every so many optimizer steps, and after the last.

    Rank zero writes. A resumed run writes no line twice: lines of later steps than the checkpoint's are removed first,
    since those steps are repeated. The time of a measurement does not count as training time, and the run's random
    numbers are left as they were.

    Args:
        every_n_steps: optimizer steps between two measurements.
    """

    file: ClassVar[str]
    """Name of the file in the run's folder."""

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"{type(self).__name__}: every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._measured = -1  # the step of the last measurement

    @abstractmethod
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set up; called on every rank before the first measurement of a run, new or resumed."""

    @abstractmethod
    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[Row], dict[str, float]]:
        """Return lines to write, without their step, and metrics to log; called on every rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up; measure where that is due at this step and the checkpoint doesn't have it."""
        if trainer.is_global_zero:
            self._remove_later(run_folder(trainer) / self.file, trainer.global_step)
        with _paused(pl_module):
            self.prepare(trainer, pl_module)
        if self._measured < trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (
            ends_step(trainer, batch_idx)
            and trainer.global_step % self.every_n_steps == 0
            and self._measured < trainer.global_step
        ):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._measured < trainer.global_step:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured = state_dict["measured"]

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with _paused(module):
            rows, metrics = self.measure(trainer, module)
            if trainer.is_global_zero:
                _append(run_folder(trainer) / self.file, [{"step": trainer.global_step, **row} for row in rows])
                log_now(trainer, metrics)
            self._measured = trainer.global_step

    def _remove_later(self, path: Path, step: int) -> None:
        """Keep the lines up to the step where this run resumes; in a new run, none."""
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step > 0 and _step_of(line) <= min(step, self._measured)]
        if len(kept) < len(lines):
            rank_zero_info(
                f"{path.name}: removed {len(lines) - len(kept):,} lines of steps that are repeated, or of another run"
            )
            with atomic_file(path) as file:
                file.write("".join(kept))


def _append(path: Path, rows: list[Row]) -> None:
    """Append lines, all or none; on a full disk they are missing, with a warning."""
    with written_or_warned(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with appending(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def _step_of(line: str) -> float:
    """Return the step of a line; infinity where a killed process left it incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _paused(module: pl.LightningModule) -> AbstractContextManager[None]:
    return module.step_logger.pause() if isinstance(module, PreferenceModule) else nullcontext()
