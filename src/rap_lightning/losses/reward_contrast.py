"""Noise-contrastive alignment with explicit rewards. a and b are the log-ratios of chosen and rejected, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.losses.base import above_zero, cross_entropy, logratios
from rap_lightning.losses.reward_aware import Distance, RewardAwareLoss


class _Contrast(RewardAwareLoss):
    """The rewards enter through their softmax, which for two is σ of their difference, the gap."""

    def __init__(self, beta: float = 0.01, temperature: float = 1.0, distance: Distance = "absolute") -> None:
        super().__init__(beta, distance)
        self.temperature = above_zero(self, "temperature", temperature)

    def shares(self, rewards: PairRewards) -> Tensor:
        """Return chosen's share of softmax(rewards / T), [B]."""
        return torch.sigmoid(self.gap(rewards) / self.temperature)


class InfoNCA(_Contrast):
    r"""InfoNCA with explicit rewards, -Σ_i p_i log softmax(β a, β b)_i, p = softmax(rewards / T).

    a and b are the log-ratios of chosen and rejected in nats. Of two responses it is SoftLabelDPO; its paper has K.

    Args:
        beta: strength of the implicit reward, per nat.
        temperature: T, in the judge's units.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369, section 3, at K = 2; β as in section C.
    """

    def forward(self, policy: PairLogps, reference: PairLogps, rewards: PairRewards) -> Tensor:
        """[B] nats."""
        a, b = logratios(policy, reference)
        return cross_entropy(self.shares(rewards), self.beta * (a - b))


class RewardNCA(_Contrast):
    r"""NCA with explicit rewards, -Σ_i (p_i log σ(β a_i) + ½ log σ(-β a_i)), p = softmax(rewards / T).

    a_i are the log-ratios of the two responses in nats. With p = (1, 0) it is NCA.

    Args:
        beta: strength of the implicit reward, per nat.
        temperature: T, in the judge's units.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369, section 4, at K = 2; β as in section C.
    """

    def forward(self, policy: PairLogps, reference: PairLogps, rewards: PairRewards) -> Tensor:
        """[B] nats."""
        share = self.shares(rewards)
        chosen, rejected = (self.beta * ratio for ratio in logratios(policy, reference))
        pulled = -share * F.logsigmoid(chosen) - (1 - share) * F.logsigmoid(rejected)
        return pulled - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
