"""The numbers that matter as plain lines, where no terminal can show a progress bar."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

PATIENCE = 10.0
"""Seconds without a line after which a validation or test says how far it is."""


class ConsoleLines(pl.Callback):
    """Prints a line per log step and per validation, and what is begun where nothing may be heard for long."""

    def __init__(self) -> None:
        self._printed = 0
        self._first = 0
        self._start = self._spoke = self._began = 0.0

    @rank_zero_only
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so: a batch of a large model takes its time."""
        batches = trainer.num_sanity_val_steps
        amount = "a batch" if batches == 1 else f"{batches:g} batches" if math.isfinite(batches) else "all batches"
        self._say(f"first, validation on {amount}, to see that it works")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run starts at a later step."""
        self._printed = self._first = trainer.global_step
        self._start = time.perf_counter()
        self._announce(trainer)

    @rank_zero_only
    def _announce(self, trainer: pl.Trainer) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        if step < total:
            every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
            lines = "a line each" if every == 1 else f"a line every {every}{' and for the first' if step == 0 else ''}"
            self._say(f"training: steps {step + 1} to {total}, {lines}")

    # The module logs at the end of a batch, after the callbacks' turn: so what it logged is printed at what comes next.

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Print what was logged since."""
        self._print_step(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what was logged since."""
        self._print_step(trainer, pl_module)
        self._spoke = self._began = time.perf_counter()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._spoke = self._began = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Say how far a long validation is."""
        if not trainer.sanity_checking:
            self._how_far("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Say how far a long test is."""
        self._how_far("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx])

    @rank_zero_only
    def _how_far(self, what: str, done: int, total: float) -> None:
        now = time.perf_counter()
        if now - self._spoke > PATIENCE and done < total:
            left = f", {(now - self._began) / done * (total - done):.0f} s left" if math.isfinite(total) else ""
            self._say(f"{what}: batch {done}/{total:g}{left}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what was logged since."""
        self._print_step(trainer, pl_module)

    @rank_zero_only
    def _print_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step, values = getattr(module, "last_logged", (self._printed, {}))
        if step <= self._printed:
            return
        self._printed = step
        elapsed, total = time.perf_counter() - self._start, int(trainer.estimated_stepping_batches)
        left = elapsed / (step - self._first) * (total - step)
        print(f"step {step}/{total}  {self._shown(values)}  {elapsed:.0f} s, {left:.0f} s left", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the validation's means."""
        self._print_means(trainer, pl_module, "val/", "validation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the test's means."""
        self._print_means(trainer, pl_module, "test/", "test")

    @rank_zero_only
    def _print_means(self, trainer: pl.Trainer, module: pl.LightningModule, prefix: str, title: str) -> None:
        values = {n.removeprefix(prefix): v for n, v in trainer.callback_metrics.items() if n.startswith(prefix)}
        if values and not trainer.sanity_checking:
            step = getattr(module, "steps_done", trainer.global_step)
            print(f"{title} at step {step}  {self._shown(values)}", flush=True)

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._spoke = time.perf_counter()

    @staticmethod
    def _shown(values: Any) -> str:
        short = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
        parts = [f"{label} {float(values[name]):.4f}" for name, label in short.items() if name in values]
        rate = values.get("pairs_per_second")
        return "  ".join(parts) + (f"  {float(rate):.3g} pairs/s" if rate is not None else "")
