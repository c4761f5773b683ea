"""DPO with a correction for the length of responses, in three ways."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, above_zero, between, margin


class LengthNormalisedDPO(PreferenceLoss):
    r"""Length-normalised DPO, -log σ(β (a / |y_w| - b / |y_l|)).

    a and b are the log-ratios of chosen and rejected in nats, |y| the response's tokens.

    Args:
        beta: strength of the mean log-ratio, per nat per token; an order larger than DPO's.

    The implicit reward is β times the mean log-ratio per token.
    Source: Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124, section 5; β as there.
    """

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__(beta)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return -F.logsigmoid(chosen - rejected)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β times the mean log-ratio per token."""
        chosen, rejected = super().implicit_rewards(policy, reference)
        return chosen / policy.chosen_lengths, rejected / policy.rejected_lengths


class RDPO(PreferenceLoss):
    r"""R-DPO, -log σ(β m + α (|y_w| - |y_l|)): a chosen response that is longer must win by less.

    m is the margin in nats, |y| the response's tokens.

    Args:
        beta: strength of the implicit reward, per nat.
        alpha: α, the penalty per token. 0.05 is the smallest that Meng et al. 2024 (SimPO) search.

    The implicit reward is β times the log-ratio, without the penalty.
    Source: Park et al. 2024, https://arxiv.org/abs/2403.19159, its length-regularised DPO.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.05) -> None:
        super().__init__(beta)
        self.alpha = above_zero(self, "alpha", alpha)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        longer = (policy.chosen_lengths - policy.rejected_lengths).to(policy.chosen.dtype)
        return -F.logsigmoid(self.beta * margin(policy, reference) + self.alpha * longer)


class LDDPO(PreferenceLoss):
    r"""LD-DPO, -log σ(β m') where tokens past the shorter response's length count α instead of 1.

    m' is the margin in nats of log-ratios Σ_{t ≤ l} + α Σ_{t > l}, with l the length of the pair's shorter response.

    Args:
        beta: strength of the implicit reward, per nat.
        alpha: α, the weight of the excess tokens, from 0 to below 1 (1 is DPO). The paper tunes it by model.

    The implicit reward is β times the decoupled log-ratio.
    Source: Liu et al. 2024, https://arxiv.org/abs/2409.06411.
    """

    requires = frozenset({"reference", "tokens"})

    def __init__(self, beta: float = 0.1, alpha: float = 0.5) -> None:
        super().__init__(beta)
        self.alpha = between(self, "alpha", alpha, 0, 1, with_low=True)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return -F.logsigmoid(chosen - rejected)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β times the log-ratio with excess tokens weighted by α."""
        assert reference is not None, "LDDPO needs a reference"
        ratios = self.beta * (self._decoupled(policy) - self._decoupled(reference))
        return ratios[0::2], ratios[1::2]

    def _decoupled(self, logps: PairLogps) -> Tensor:
        tokens = logps.tokens
        assert tokens is not None, "LDDPO needs token log-probabilities"
        shorter = torch.minimum(logps.chosen_lengths, logps.rejected_lengths)
        shared = tokens.position < shorter[tokens.segment // 2]
        values = torch.where(shared, tokens.logps, self.alpha * tokens.logps)
        return values.new_zeros(2 * len(shorter)).index_add(0, tokens.segment, values)
