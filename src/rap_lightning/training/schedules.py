"""Learning-rate schedules with a warm-up ratio; any callable of (optimizer, total_steps) will do as well."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rap_lightning.errors import ConfigError


class Schedule(ABC):
    """A factory of schedulers that step once per optimizer step."""

    @abstractmethod
    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the scheduler for a run of ``total_steps`` optimizer steps."""


class CosineWithWarmup(Schedule):
    """Linear warm-up, then half a cosine down to ``final_ratio`` of the peak.

    During the warm-up the rate is (step + 1) / (warm-up steps + 1) of the peak: above 0 at the first step.

    Args:
        warmup_ratio: warm-up steps as a share of all steps.
        final_ratio: last learning rate as a share of the peak.
    """

    def __init__(self, warmup_ratio: float = 0.1, final_ratio: float = 0.0) -> None:
        self.warmup_ratio, self.final_ratio = _ratio("warmup_ratio", warmup_ratio), _ratio("final_ratio", final_ratio)

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        warmup = math.ceil(self.warmup_ratio * total_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return _warming(step, warmup)
            done = (step - warmup) / max(1, total_steps - warmup)
            return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        return LambdaLR(optimizer, factor)


class ConstantWithWarmup(Schedule):
    """The linear warm-up of CosineWithWarmup, then a constant rate.

    Args:
        warmup_ratio: warm-up steps as a share of all steps.
    """

    def __init__(self, warmup_ratio: float = 0.0) -> None:
        self.warmup_ratio = _ratio("warmup_ratio", warmup_ratio)

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        warmup = math.ceil(self.warmup_ratio * total_steps)
        return LambdaLR(optimizer, lambda step: _warming(step, warmup) if step < warmup else 1.0)


ByName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
"""The schedules of transformers that depend on the step alone."""
FROM_TOTAL = {"num_warmup_steps": "warmup_ratio", "num_training_steps": "--trainer.max_steps"}
"""Arguments of transformers' schedules that are known already, and what sets them."""


class TransformersSchedule(Schedule):
    """A schedule of transformers, the values of ``lr_scheduler_type`` in its TrainingArguments.

    Most of them warm up from a rate of 0, so that their first step does nothing; CosineWithWarmup begins above it.

    Args:
        name: of the schedule; those that follow a metric (reduce_lr_on_plateau, greedy) are left out.
        warmup_ratio: warm-up steps as a share of all steps, rounded up.
        options: further arguments, as in ``lr_scheduler_kwargs``: ``{min_lr_rate: 0.1}`` for cosine_with_min_lr,
            ``{num_decay_steps: 100, decay_type: 1-sqrt}`` for warmup_stable_decay.

    Raises:
        ConfigError: the schedule has no such option, or lacks one.
    """

    def __init__(self, name: ByName, warmup_ratio: float = 0.0, options: dict[str, Any] | None = None) -> None:
        self.name, self.warmup_ratio, self.options = name, _ratio("warmup_ratio", warmup_ratio), options or {}
        if name == "constant" and (warmup_ratio or options):
            raise ConfigError("schedule constant has no options: use constant_with_warmup, or leave them out.")
        for option, instead in FROM_TOTAL.items():
            if option in self.options:
                raise ConfigError(f"schedule {name}: {option} follows from {instead}; remove it from the options.")
        # a trial over more steps than any run has: what is missing or wrong is reported before a model is loaded
        self(torch.optim.SGD([torch.zeros(1)], lr=1.0), 10**9)

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        from transformers import get_scheduler

        warmup = math.ceil(self.warmup_ratio * total_steps)
        decay = self.options.get("num_decay_steps", 0)
        if isinstance(decay, int) and warmup + decay > total_steps:
            raise ConfigError(
                f"schedule {self.name}: {warmup:,} warm-up steps and num_decay_steps {decay:,} are more than the run's "
                f"{total_steps:,} steps. Set a smaller num_decay_steps or warmup_ratio."
            )
        if self.name == "constant_with_warmup" and self.options:
            raise ConfigError(f"schedule {self.name} has no options {', '.join(self.options)}; remove them.")
        try:
            found = get_scheduler(self.name, optimizer, warmup, total_steps, self.options)
            for made in found.lr_lambdas:
                for step in (0, warmup, total_steps // 2, total_steps):
                    if not math.isfinite(made(step)):
                        raise ValueError(f"the rate at step {step} is not finite")
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"schedule {self.name}, options {self.options}: {error}") from error
        scheduler: LRScheduler = found
        return scheduler


def _warming(step: int, warmup: int) -> float:
    """Return the share of the peak at a step, counted from 0; with a rate of 0 the first step would do nothing."""
    return (step + 1) / (warmup + 1)


def _ratio(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be from 0 to 1, found {value}")
    return value
