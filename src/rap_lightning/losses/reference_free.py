"""Losses that need no reference, so none is loaded."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss


class SimPO(PreferenceLoss):
    r"""SimPO, -log σ(β (s_w - s_l) - γ), where s is the response's mean log-probability per token.

    Args:
        beta: strength of the mean log-probability, per nat.
        gamma: the margin γ that chosen must win by, in the units of β s. The paper tunes γ / β; 0.5 is its usual start.

    The implicit reward is β s, without γ. Source: Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6.
    """

    needs_reference = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__(beta)
        self.gamma = gamma

    def forward(self, policy: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, None)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β times the mean log-probability per token."""
        return (
            self.beta * policy.chosen / policy.chosen_lengths,
            self.beta * policy.rejected / policy.rejected_lengths,
        )
