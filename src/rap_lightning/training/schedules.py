"""Learning-rate schedules with a warm-up ratio; any callable of (optimizer, total_steps) will do as well."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

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
        """Return the scheduler."""
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
        """Return the scheduler."""
        warmup = math.ceil(self.warmup_ratio * total_steps)
        return LambdaLR(optimizer, lambda step: _warming(step, warmup) if step < warmup else 1.0)


def _warming(step: int, warmup: int) -> float:
    """Return the share of the peak at a step, counted from 0; with a rate of 0 the first step would do nothing."""
    return (step + 1) / (warmup + 1)


def _ratio(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be from 0 to 1, found {value}")
    return value
