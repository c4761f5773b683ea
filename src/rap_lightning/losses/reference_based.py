"""Losses of the margin between chosen and rejected log-ratios against a frozen reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.errors import ConfigError
from rap_lightning.losses.base import PreferenceLoss, margin


class DPO(PreferenceLoss):
    r"""DPO, -log σ(β m), with cDPO's label smoothing ε: -(1 - ε) log σ(β m) - ε log σ(-β m).

    m is the margin in nats. ε is the assumed share of pairs whose labels are flipped.

    Args:
        beta: strength of the implicit reward, per nat.
        label_smoothing: ε, from 0 to below 0.5.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; ε: Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"DPO: label_smoothing must be from 0 to below 0.5, found {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        h = self.beta * margin(policy, reference)
        return -(1 - self.label_smoothing) * F.logsigmoid(h) - self.label_smoothing * F.logsigmoid(-h)


class Hinge(PreferenceLoss):
    r"""The hinge of SLiC on the normalised margin, max(0, 1 - β m).

    Args:
        beta: strength of the implicit reward, per nat.

    Source: Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, equation 11; the hinge: Zhao et al. 2023 (SLiC-HF),
    https://arxiv.org/abs/2305.10425.
    """

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], unitless."""
        return torch.relu(1 - self.beta * margin(policy, reference))
