"""Measuring the policy now and then during fit, into json lines that a resumed run goes on with."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.callbacks.goal_sampling import log_now
from rap_lightning.callbacks.run_folder import run_folder
from rap_lightning.errors import ConfigError
from rap_lightning.module import PreferenceModule

Row = dict[str, Any]


class AtIntervals(pl.Callback):
    """Measures before the first step, after every so many optimizer steps, and after the last.

    Rank zero writes. A run that goes on from a checkpoint leaves no line twice: what stands in the file of later steps
    than the checkpoint's is taken away, since those steps are done again. Time spent here is no training time, and the
    run's random numbers are left as they were.

    Args:
        every_n_steps: optimizer steps between two measurements.
    """

    file: ClassVar[str]
    """Name of the lines in the run's folder."""

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"{type(self).__name__}: every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._measured = -1  # the step of the last measurement

    @abstractmethod
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Called on every rank before the first measurement of a run, new or resumed."""

    @abstractmethod
    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[Row], dict[str, float]]:
        """Lines to write, without their step, and metrics to log; called on every rank."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set up, and measure where that is due at this step and the checkpoint hasn't got it."""
        if trainer.is_global_zero:
            self._take_back(run_folder(trainer) / self.file, trainer.global_step)
        with _no_training_time(pl_module):
            self.prepare(trainer, pl_module)
        if self._measured < trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after a step that it is due after; a batch within an accumulated step is none."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if stepped and trainer.global_step % self.every_n_steps == 0 and self._measured < trainer.global_step:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure after the last step."""
        if self._measured < trainer.global_step:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The step of the last measurement."""
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after it."""
        self._measured = state_dict["measured"]

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with _no_training_time(module):
            rows, metrics = self.measure(trainer, module)
            if trainer.is_global_zero:
                _append(run_folder(trainer) / self.file, [{"step": trainer.global_step, **row} for row in rows])
                log_now(trainer, metrics)
            self._measured = trainer.global_step

    def _take_back(self, path: Path, step: int) -> None:
        """Keep the lines up to where this run goes on; of a new run, none."""
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step > 0 and _step_of(line) <= min(step, self._measured)]
        if len(kept) < len(lines):
            rank_zero_info(
                f"{path.name}: {len(lines) - len(kept):,} lines of steps that are done again, or of another run, "
                "taken away"
            )
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)


def _append(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _step_of(line: str) -> float:
    """The step of a line; past all where a killed process cut it off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _no_training_time(module: pl.LightningModule) -> AbstractContextManager[None]:
    return module.not_training() if isinstance(module, PreferenceModule) else nullcontext()
