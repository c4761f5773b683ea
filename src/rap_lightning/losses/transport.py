"""Alignment by optimal transport: losses that compare distributions of margins over the batch, not single pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, live, logratios

SORTS = "values are sorted within the batch of each device"


class AOT(PreferenceLoss):
    r"""AOT on pairs, -log σ(β (p₍ᵢ₎ - q₍ᵢ₎)), where p₍ᵢ₎ and q₍ᵢ₎ are the i-th smallest of the batch.

    p = log π(y_w) - log π(y_l) of the policy and q of the reference, in nats. The value is that of the pair whose p it
    is.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, section 3 (paired).
    """

    least_pairs = 2
    batch_level = SORTS

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        pairs = live(policy)
        ours = policy.chosen - policy.rejected
        theirs = reference.chosen - reference.rejected
        return _sorted_loss(self.beta, ours, theirs, pairs)


class AOTUnpaired(PreferenceLoss):
    r"""AOT on unpaired responses, -log σ(β (a₍ᵢ₎ - b₍ᵢ₎)), where a₍ᵢ₎ and b₍ᵢ₎ are the i-th smallest of the batch.

    a and b are the log-ratios of chosen and rejected in nats. The value is that of the pair whose a it is.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, section 3 (unpaired).
    """

    least_pairs = 2
    batch_level = SORTS

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = logratios(policy, reference)
        return _sorted_loss(self.beta, chosen, rejected, live(policy))


def _sorted_loss(beta: float, above: Tensor, below: Tensor, pairs: Tensor) -> Tensor:
    """Return -log σ of the differences of both, sorted over ``pairs``, [B]; 0 for other pairs."""
    order = torch.argsort(above[pairs])
    losses = -F.logsigmoid(beta * (above[pairs][order] - below[pairs].sort().values))
    return torch.zeros_like(above).index_copy(0, pairs[order], losses)
