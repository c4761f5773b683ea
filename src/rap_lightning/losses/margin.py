"""Losses of the margin m between chosen and rejected log-ratios against a reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, above_zero, between, bounded_exp, cross_entropy, logratios, margin


class DPO(PreferenceLoss):
    r"""DPO, -log σ(β m), with cDPO's label smoothing ε: -(1 - ε) log σ(β m) - ε log σ(-β m).

    m is the margin in nats. ε is the assumed share of pairs whose labels are flipped.

    Args:
        beta: strength of the implicit reward, per nat.
        label_smoothing: ε, from 0 to below 0.5.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; ε: Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3.

    >>> lengths = torch.tensor([4, 2])
    >>> before = PairLogps.from_segments(torch.tensor([-9.0, -6.0]), lengths)  # chosen, rejected, in nats
    >>> after = PairLogps.from_segments(torch.tensor([-7.0, -9.0]), lengths)
    >>> DPO(beta=0.1)(before, before), DPO(beta=0.1)(after, before)  # log 2 where nothing has changed
    (tensor([0.6931]), tensor([0.4741]))
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        self.label_smoothing = between(self, "label_smoothing", label_smoothing, 0, 0.5, with_low=True)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        return cross_entropy(1 - self.label_smoothing, self.beta * margin(policy, reference))


class RobustDPO(PreferenceLoss):
    r"""Robust DPO, (-(1 - ε) log σ(β m) + ε log σ(-β m)) / (1 - 2ε): unbiased when a share ε of labels is flipped.

    m is the margin in nats. The value is negative where m is large; only its mean over noise equals DPO's.

    Args:
        beta: strength of the implicit reward, per nat.
        label_smoothing: ε, the rate of flipped labels, from 0 to below 0.5.

    Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, section 3.1; ε as in their section 6.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1) -> None:
        super().__init__(beta)
        self.label_smoothing = between(self, "label_smoothing", label_smoothing, 0, 0.5, with_low=True)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        h, e = self.beta * margin(policy, reference), self.label_smoothing
        return (e * F.logsigmoid(-h) - (1 - e) * F.logsigmoid(h)) / (1 - 2 * e)


class Hinge(PreferenceLoss):
    r"""The hinge of SLiC on the normalised margin, max(0, 1 - β m).

    m is the margin in nats.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, equation 11; the hinge: Zhao et al. 2023 (SLiC-HF),
    https://arxiv.org/abs/2305.10425.

    >>> lengths = torch.tensor([4, 2])
    >>> before = PairLogps.from_segments(torch.tensor([-9.0, -6.0]), lengths)
    >>> after = PairLogps.from_segments(torch.tensor([-7.0, -9.0]), lengths)
    >>> Hinge(beta=0.1)(after, before)  # the margin is 5 nats
    tensor([0.5000])
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], unitless."""
        return torch.relu(1 - self.beta * margin(policy, reference))


class IPO(PreferenceLoss):
    r"""IPO, (m - 1 / (2β))²: the margin is regressed to a finite target.

    m is the margin in nats: of sums over tokens as in the paper's equation, or, with per_token, of means over each
    response's tokens, as TRL computes it (its authors were told that the paper's own results used means).

    Args:
        beta: the paper's τ: the target margin is 1 / (2β) nats, or nats per token.
        per_token: mean log-ratios instead of sums.

    The implicit reward is β times the log-ratio, divided by the response's length with per_token.
    Source: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17.
    """

    def __init__(self, beta: float = 0.1, per_token: bool = False) -> None:
        super().__init__(beta)
        self.per_token = per_token

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], nats² (per token²)."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return ((chosen - rejected) / self.beta - 1 / (2 * self.beta)) ** 2

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β times the log-ratio, its mean over tokens with per_token."""
        chosen, rejected = super().implicit_rewards(policy, reference)
        if self.per_token:
            return chosen / policy.chosen_lengths, rejected / policy.rejected_lengths
        return chosen, rejected


class EXO(PreferenceLoss):
    r"""EXO on pairs, the reverse KL(q ‖ p) of q = (σ(β m), σ(-β m)) from the smoothed label p = (1 - ε, ε).

    m is the margin in nats.

    Args:
        beta: strength of the implicit reward, per nat.
        label_smoothing: ε, above 0 (the KL is infinite at 0) to below 0.5.

    Source: Ji et al. 2024, https://arxiv.org/abs/2402.00856, equation 16; ε as there.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3) -> None:
        super().__init__(beta)
        self.label_smoothing = between(self, "label_smoothing", label_smoothing, 0, 0.5, with_low=False)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        h, e = self.beta * margin(policy, reference), self.label_smoothing
        kept = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-e))
        return kept + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(e))


class DiscoPOP(PreferenceLoss):
    r"""DiscoPOP, the log-ratio modulated loss (1 - s) · -log σ(h) + s · exp(-h), with h = β m and s = σ(h / τ).

    m is the margin in nats. The loss is not convex: it rises between about h = 0 and 0.1.

    Args:
        beta: strength of the implicit reward, per nat.
        tau: τ, the temperature of the modulation.

    Source: Lu et al. 2024, https://arxiv.org/abs/2406.08414, equation 5; β as in B.1, τ as in E.
    """

    at_zero_margin = (
        "the loss the paper found is not convex: at h = 0 its slope is (1 - ln 2) / (4τ) - 3/4, above 0 at its τ"
    )

    def __init__(self, beta: float = 0.05, tau: float = 0.05) -> None:
        super().__init__(beta)
        self.tau = above_zero(self, "tau", tau)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        h = self.beta * margin(policy, reference)
        # s exp(-h) in one exponent: apart, they are 0 times infinity far below zero
        return torch.sigmoid(-h / self.tau) * -F.logsigmoid(h) + bounded_exp(F.logsigmoid(h / self.tau) - h)


class DPOPositive(PreferenceLoss):
    r"""DPOP, -log σ(β (m - λ max(0, -a))): DPO with a penalty where chosen is less likely than under the reference.

    m is the margin and a the chosen log-ratio, in nats.

    Args:
        beta: strength of the implicit reward, per nat.
        penalty: λ, above 0 (0 would be DPO).

    Source: Pal et al. 2024 (Smaug), https://arxiv.org/abs/2402.13228; β and λ as for their models.
    """

    def __init__(self, beta: float = 0.3, penalty: float = 50.0) -> None:
        super().__init__(beta)
        self.penalty = above_zero(self, "penalty", penalty)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = logratios(policy, reference)
        return -F.logsigmoid(self.beta * (chosen - rejected - self.penalty * torch.relu(-chosen)))
