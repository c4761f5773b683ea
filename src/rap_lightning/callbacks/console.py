"""The numbers that matter as plain lines, where no terminal can show a progress bar."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


class ConsoleLines(pl.Callback):
    """Prints a line per log step and per validation."""

    def __init__(self) -> None:
        self._printed = 0
        self._first = 0
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a resumed run starts at a later step."""
        self._printed = self._first = trainer.global_step
        self._start = time.perf_counter()

    # The module logs at the end of a batch, after the callbacks' turn: so what it logged is printed at what comes next.

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Print what was logged since."""
        self._print_step(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what was logged since."""
        self._print_step(trainer, pl_module)

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

    @staticmethod
    def _shown(values: Any) -> str:
        short = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
        parts = [f"{label} {float(values[name]):.4f}" for name, label in short.items() if name in values]
        rate = values.get("pairs_per_second")
        return "  ".join(parts) + (f"  {float(rate):.3g} pairs/s" if rate is not None else "")
