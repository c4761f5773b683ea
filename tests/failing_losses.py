"""Losses that fail: on certain pairs, however a step is split over batches and ranks; on one rank. And a slow one."""

import math
import time
from typing import Any

import torch

from rap_lightning.errors import DataError
from rap_lightning.losses import DPO


class ByLength(DPO):
    """NaN where the chosen response has ``length`` tokens.

    Args:
        length: in tokens.
    """

    def __init__(self, length: int = 13, beta: float = 0.5) -> None:
        super().__init__(beta)
        self.length = length

    def forward(self, policy: Any, reference: Any) -> torch.Tensor:
        losses = super().forward(policy, reference)
        return torch.where(policy.chosen_lengths == self.length, math.nan, losses) if self.training else losses


class OnRank(DPO):
    """Raises on rank 1, in its third forward pass.

    Args:
        plain: a KeyError, as a bug would, instead of a DataError.
    """

    def __init__(self, plain: bool = False, beta: float = 0.5) -> None:
        super().__init__(beta)
        self.plain, self.passes = plain, 0

    def forward(self, policy: Any, reference: Any) -> torch.Tensor:
        self.passes += 1
        if self.passes == 3 and torch.distributed.get_rank() == 1:
            raise (KeyError if self.plain else DataError)("this is rank 1's own")
        return super().forward(policy, reference)


class Slow(DPO):
    """Sleeps, so that a run can be stopped in the middle.

    Args:
        seconds: in each forward pass.
    """

    def __init__(self, seconds: float = 0.3, beta: float = 0.5) -> None:
        super().__init__(beta)
        self.seconds = seconds

    def forward(self, policy: Any, reference: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(policy, reference)
