"""A loss that breaks on certain pairs, however a step is cut and spread over ranks."""

import math
from typing import Any

import torch

from rap_lightning.losses import DPO


class ByLength(DPO):
    """NaN wherever the chosen response has that many tokens.

    Args:
        length: which.
    """

    def __init__(self, length: int = 13, beta: float = 0.5) -> None:
        super().__init__(beta)
        self.length = length

    def forward(self, policy: Any, reference: Any) -> torch.Tensor:
        losses = super().forward(policy, reference)
        return torch.where(policy.chosen_lengths == self.length, math.nan, losses) if self.training else losses
