"""Metrics and progress as plain lines, for output that can't show a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from rap_lightning.training.step_logger import BAR_METRICS, LoggedStep, LogObserver

PATIENCE = 10.0
"""Seconds without a line after which a validation or test prints its progress."""


class ConsoleLines(LogObserver):
    """Prints a line per logged step and per validation, and one at the start of what may take long."""

    def __init__(self) -> None:
        self._first_step = 0
        self._start = self._printed = self._began = 0.0  # of training, the last line, and the validation or test

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run starts at a later step."""
        self._start, self._first_step = time.perf_counter(), trainer.global_step
        self._announce(trainer)

    @rank_zero_only
    def _announce(self, trainer: pl.Trainer) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        if step < total:
            every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
            lines = "a line each" if every == 1 else f"a line every {every}{' and for the first' if step == 0 else ''}"
            self._print(f"training: steps {step + 1} to {total}, {lines}")

    @rank_zero_only
    def on_step_logged(self, trainer: pl.Trainer, logged: LoggedStep) -> None:
        elapsed, total = time.perf_counter() - self._start, int(trainer.estimated_stepping_batches)
        left = elapsed / (logged.step - self._first_step) * (total - logged.step)
        self._print(f"step {logged.step}/{total}  {_shown(logged.values)}  {elapsed:.0f} s, {left:.0f} s left")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce the sanity check, whose batch may take long with a large model, and start the clock."""
        if trainer.sanity_checking:  # `on_sanity_check_start` is called without any validation data, too
            self._announce_sanity_check(trainer)
        self._printed = self._began = time.perf_counter()

    @rank_zero_only
    def _announce_sanity_check(self, trainer: pl.Trainer) -> None:
        steps, batches = trainer.num_sanity_val_steps, sum(trainer.num_sanity_val_batches)
        amount = "one batch" if batches == 1 else "all batches" if math.isinf(steps) else f"{batches:g} batches"
        self._print(f"sanity-checking validation on {amount}")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._printed = self._began = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not trainer.sanity_checking:
            self._print_progress("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._print_progress("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx])

    @rank_zero_only
    def _print_progress(self, what: str, done: int, total: float) -> None:
        now = time.perf_counter()
        if now - self._printed > PATIENCE and done < total:
            left = f", {(now - self._began) / done * (total - done):.0f} s left" if math.isfinite(total) else ""
            self._print(f"{what}: batch {done}/{total:g}{left}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print_means(trainer, pl_module, "val/", "validation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print_means(trainer, pl_module, "test/", "test")

    @rank_zero_only
    def _print_means(self, trainer: pl.Trainer, module: pl.LightningModule, prefix: str, title: str) -> None:
        values = {n.removeprefix(prefix): v for n, v in trainer.callback_metrics.items() if n.startswith(prefix)}
        if values and not trainer.sanity_checking:
            step = getattr(module, "steps_done", trainer.global_step)  # of a user's own module too
            self._print(f"{title} at step {step}  {_shown(values)}")

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self._printed = time.perf_counter()


def _shown(values: Mapping[str, Any]) -> str:
    parts = [f"{label} {float(values[name]):.4f}" for name, label in BAR_METRICS.items() if name in values]
    if "pairs_per_second" in values:
        parts.append(f"{float(values['pairs_per_second']):.3g} pairs/s")
    return "  ".join(parts)
