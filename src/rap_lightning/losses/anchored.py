"""Losses that compare each response with a fixed target, not only with the other response."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, logratios


class NCA(PreferenceLoss):
    r"""NCA on pairs, -log σ(β a) - ½ log σ(-β a) - ½ log σ(-β b).

    a and b are the log-ratios of chosen and rejected in nats.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369, section 4.1; β as in section C.
    """

    def __init__(self, beta: float = 0.01) -> None:
        super().__init__(beta)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


class SPPOHard(PreferenceLoss):
    r"""SPPO with hard labels, (a - 1 / (2β))² + (b + 1 / (2β))².

    a and b are the log-ratios of chosen and rejected in nats. β is the paper's 1 / η.

    Args:
        beta: strength of the implicit reward, per nat: the targets are ±1 / (2β) nats.

    Source: Wu et al. 2024, https://arxiv.org/abs/2405.00675, equation 4.7 with win probabilities 1 and 0; η = 1000.
    """

    def __init__(self, beta: float = 0.001) -> None:
        super().__init__(beta)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], nats²."""
        chosen, rejected = logratios(policy, reference)
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2


class APOZero(PreferenceLoss):
    r"""APO-zero, σ(-β a) + σ(β b): chosen becomes likelier and rejected less likely than under the reference.

    a and b are the log-ratios of chosen and rejected in nats. For chosen responses better than the policy's own.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 7; β as in section 5.2.
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], unitless."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


class APODown(PreferenceLoss):
    r"""APO-down, σ(β a) + σ(-β (a - b)): both responses become less likely, rejected more so.

    a and b are the log-ratios of chosen and rejected in nats. For chosen responses worse than the policy's own.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 8; β as in section 5.2.
    """

    at_zero_margin = "it is meant to lower chosen: at zero its two terms cancel in chosen, and rejected is lowered"

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], unitless."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
