"""A warm-up before the loss: score-conditioned SFT, so that the policy knows goals before it is trained on pairs."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from rap_lightning.errors import ConfigError
from rap_lightning.training.schedules import Schedule


@dataclass(frozen=True)
class WarmUp:
    """Optimizer steps of SFT before the loss: with both halves, on each response under its own goal.

    The result is the same as from two runs in a row: after the last of these steps the policy becomes the reference (so
    margins begin at 0 there), the optimizer state is reset, and the schedule starts again for the remaining steps.

    Args:
        steps: number of optimizer steps, part of the run's.
        lr: peak learning rate of the warm-up; by default the optimizer's. Full fine-tuning with preference losses uses
            rates around 5e-7, at which SFT learns nothing in a few hundred steps: 1e-5 is usual there.
    """

    steps: int
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"--model.warm_up.steps must be at least 1, found {self.steps}. For no warm-up, remove it."
            )
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ConfigError(f"--model.warm_up.lr must be above 0 and finite, found {self.lr}")

    def scheduler(self, schedule: Schedule, optimizer: Optimizer, total: int) -> LRScheduler:
        """Return the schedule twice: over the warm-up's steps, then over the other ``total - steps``."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        both = []
        for steps, lr in ((self.steps, self.lr), (total - self.steps, None)):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak if lr is None else lr
                group.pop("initial_lr", None)  # which a scheduler would take as the peak
            both.append(schedule(optimizer, steps))
        return SequentialLR(optimizer, both, milestones=[self.steps])

    def end(self, trainer: pl.Trainer) -> None:
        """Reset the optimizer state, and the best values of monitored metrics: SFT's are in other units."""
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                callback.best_k_models, callback.best_model_path = {}, ""
                callback.best_model_score, callback.kth_best_model_path = None, ""
                callback.kth_value = _worst(callback.mode)
            elif isinstance(callback, EarlyStopping):
                callback.wait_count, callback.best_score = 0, _worst(callback.mode)


def _worst(mode: str) -> Tensor:
    return torch.tensor(float("inf") if mode == "min" else float("-inf"))
