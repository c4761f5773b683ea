"""A warm-up before the loss: score-conditioned SFT, so that the policy knows what goals mean before it is pushed."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from rap_lightning.errors import ConfigError
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import NoReference, Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.post_warmup import Warmed
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.training.schedules import Schedule


@dataclass(frozen=True)
class WarmUp:
    """Optimizer steps of SFT before the loss: with both halves, on each response under its own goal.

    It is as if two runs followed each other: after the last of these steps the policy becomes the reference (so margins
    begin at 0 there), the optimizer forgets its moments, and the schedule, which the warm-up has one of its own of,
    begins anew for the steps that are left.

    Args:
        steps: how many, of the run's.
        lr: peak learning rate of the warm-up; by default the optimizer's. Full fine-tuning with preference losses takes
            rates around 5e-7, at which SFT learns nothing in a few hundred steps: 1e-5 is usual there.
    """

    steps: int
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"--model.warm_up.steps must be at least 1, found {self.steps}; to have none, leave it out."
            )
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ConfigError(f"--model.warm_up.lr must be above 0 and finite, found {self.lr}")

    def reference(self, reference: Reference | None, loss: PreferenceLoss) -> Reference | None:
        """The policy as the warm-up leaves it, for a loss that needs a reference.

        Raises:
            ConfigError: another one is asked for.
        """
        if not loss.needs_reference:
            return reference
        if reference is not None:
            reasons: dict[type, str] = {
                Stored: "its log-probabilities are computed before the first step",
                AdaptersOff: "the policy without its adapter is the one before the warm-up",
                Frozen: "it is the policy before the warm-up, or another model",
                NoReference: "it is none",
            }
            reason = next((text for kind, text in reasons.items() if isinstance(reference, kind)), "it is another one")
            raise ConfigError(
                "after --model.warm_up the reference is the policy as the warm-up left it, and "
                f"{type(reference).__name__} can't be that ({reason}). Leave --model.reference out."
            )
        return Warmed(self.steps)

    def scheduler(self, schedule: Schedule, optimizer: Optimizer, total: int) -> LRScheduler:
        """The schedule twice: over the warm-up's steps, then over the others.

        Raises:
            ConfigError: no step is left for the loss.
        """
        if self.steps >= total:
            raise ConfigError(
                f"--model.warm_up.steps {self.steps} leaves none of the run's {total} optimizer steps to the loss. "
                "Warm up for fewer, or train longer (--trainer.max_steps, --trainer.max_epochs)."
            )
        peaks = [group["lr"] for group in optimizer.param_groups]
        both = []
        for steps, lr in ((self.steps, self.lr), (total - self.steps, None)):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak if lr is None else lr
                group.pop("initial_lr", None)  # what a scheduler takes for the peak
            both.append(schedule(optimizer, steps))
        return SequentialLR(optimizer, both, milestones=[self.steps])

    def end(self, trainer: pl.Trainer) -> None:
        """Forget what is the warm-up's alone: the optimizer's moments, and the best value of what is monitored."""
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


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise ConfigError where the optimizer's state isn't ours to forget."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            "--model.warm_up doesn't go with DeepSpeed, which keeps the optimizer's state to itself. Use DDP or FSDP2, "
            "or two runs: --model.loss SFT, then another from its exported folder."
        )
