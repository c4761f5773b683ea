"""A loss and a module of one's own, named on the command line by import path.

    pip install ./examples/my_losses
    rap-lightning fit --config configs/quickstart.yaml --model.loss my_losses.FocalDPO --model.loss.focus 1
    rap-lightning fit --config configs/quickstart.yaml --model my_losses.HighGoalsFirst

``rap-lightning fit --model.loss.help my_losses.FocalDPO`` prints the docstring and the options.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning import PreferenceLoss, PreferenceModule
from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.losses.base import margin


class FocalDPO(PreferenceLoss):
    """DPO that turns to the pairs not yet won: -(1 - p)^γ log p, p = σ(β m).

    m is the margin in nats. The weighting is the focal loss's (Lin et al. 2017, https://arxiv.org/abs/1708.02002).

    Args:
        beta: strength of the implicit reward, per nat.
        focus: γ; 0 is DPO.
    """

    def __init__(self, beta: float = 0.1, focus: float = 2.0) -> None:
        super().__init__(beta)
        self.focus = focus

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        log_p = F.logsigmoid(self.beta * margin(policy, reference))
        return -((1 - log_p.exp()) ** self.focus) * log_p


class HighGoalsFirst(PreferenceModule):
    """Pairs whose goal is the lower reward count half."""

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of each pair, and the implicit rewards that are logged."""
        losses, implicit = super().pair_losses(policy, reference, rewards)
        return torch.where(rewards.chosen < rewards.rejected, losses / 2, losses), implicit
