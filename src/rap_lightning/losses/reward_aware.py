r"""Losses that use how much better chosen is, not only which response is better.

m is the margin of log-ratios in nats; Δ is the gap, by which chosen is better than rejected, in the judge's units.

Which response is better depends on the goal. A pair with a goal g in its prompt is chosen by R(y) = -|g - r(y)|, which
is largest, 0, for the response that has the goal's own reward (the paper squares it: https://arxiv.org/abs/2410.08067,
section 4). Under chosen's own reward as goal, Δ = R(y_w) - R(y_l) = |r_w - r_l|: in the half whose goal is the lower
reward, the judge's own r_w - r_l is below 0 and would push against the relabelling. Under the best goal, and under
drawn ones, Δ = |g - r_l| - |g - r_w|. A pair without a goal has Δ = r_w - r_l.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.losses.base import PreferenceLoss, above_zero, cross_entropy, margin

Distance = Literal["absolute", "squared"]


class RewardAwareLoss(PreferenceLoss):
    """A loss that uses the gap between the rewards.

    Args:
        beta: strength of the implicit reward, per nat.
        distance: of a reward from the goal: absolute keeps the judge's units, squared is the paper's -(g - r)².
            Without a goal in the prompt the gap is the difference of the rewards either way.
    """

    requires = frozenset({"reference", "rewards"})

    def __init__(self, beta: float = 0.1, distance: Distance = "absolute") -> None:
        super().__init__(beta)
        self.distance = distance

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, distance={self.distance}"

    def gap(self, rewards: PairRewards) -> Tensor:
        """Return Δ, [B]: by how much chosen is better under its goal, or by the judge's rewards where there is none."""
        given = rewards.under_goal(2 if self.distance == "squared" else 1)
        return given.chosen - given.rejected


class GapLoss(RewardAwareLoss):
    """A loss of the margin and the gap alone; a subclass defines ``compare``."""

    def forward(self, policy: PairLogps, reference: PairLogps, rewards: PairRewards) -> Tensor:
        """[B]."""
        return self.compare(margin(policy, reference), self.gap(rewards))

    @abstractmethod
    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """Return the loss of each pair, [B], from its margin and its gap, [B] each."""


class ODPO(GapLoss):
    r"""ODPO, DPO with an offset: -log σ(β m - α log Δ): the larger the gap, the larger the required margin.

    m is the margin in nats and Δ the gap in the judge's units. Below Δ = 1 the offset is negative.

    Args:
        beta: strength of the implicit reward, per nat.
        alpha: α, the weight of the offset.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Amini et al. 2024, https://arxiv.org/abs/2402.10571, with the logarithm as its scaling function.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 1.0, distance: Distance = "absolute") -> None:
        super().__init__(beta, distance)
        self.alpha = above_zero(self, "alpha", alpha)

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B] nats."""
        return -F.logsigmoid(self.beta * m - self.alpha * gap.clamp(min=torch.finfo(gap.dtype).tiny).log())


class MarginDPO(GapLoss):
    r"""DPO with the margin loss of reward models, -log σ(β m - λ Δ).

    m is the margin in nats and Δ the gap in the judge's units.

    Args:
        beta: strength of the implicit reward, per nat.
        scale: λ, implicit reward required per unit of the gap. 1/3 takes gaps of 0-9 to 0-3, Llama 2's large margins.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Touvron et al. 2023 (Llama 2), https://arxiv.org/abs/2307.09288, equation 2, with β m as the model's reward.
    """

    def __init__(self, beta: float = 0.1, scale: float = 1 / 3, distance: Distance = "absolute") -> None:
        super().__init__(beta, distance)
        self.scale = above_zero(self, "scale", scale)

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B] nats."""
        return -F.logsigmoid(self.beta * m - self.scale * gap)


class RPOSquared(GapLoss):
    r"""RPO with the squared distance, (β m - η Δ)²: the implicit reward gap is regressed to the judge's.

    m is the margin in nats and Δ the gap in the judge's units.

    Args:
        beta: strength of the implicit reward, per nat.
        eta: η, implicit reward per unit of the judge's.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Sun et al. 2025, https://arxiv.org/abs/2502.00203 (RPO-sqloss); RPO: Adler et al. 2024 (Nemotron-4 340B),
    https://arxiv.org/abs/2406.11704, section 3.3.
    """

    def __init__(self, beta: float = 0.1, eta: float = 1.0, distance: Distance = "absolute") -> None:
        super().__init__(beta, distance)
        self.eta = above_zero(self, "eta", eta)

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B]."""
        return (self.beta * m - self.eta * gap) ** 2


class RPOBackwardKL(RPOSquared):
    r"""RPO with the backward KL, KL(p ‖ q) of Bernoullis p = σ(η Δ), the judge's, and q = σ(β m), the policy's.

    m is the margin in nats and Δ the gap in the judge's units. The names of the two KLs are NeMo-Aligner's.

    Args:
        beta: strength of the implicit reward, per nat.
        eta: η, implicit reward per unit of the judge's.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Adler et al. 2024 (Nemotron-4 340B), https://arxiv.org/abs/2406.11704, section 3.3; Sun et al. 2025,
    https://arxiv.org/abs/2502.00203 (RPO-bwd).
    """

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B] nats."""
        return _bernoulli_kl(self.eta * gap, self.beta * m)


class RPOForwardKL(RPOSquared):
    r"""RPO with the forward KL, KL(q ‖ p) of Bernoullis q = σ(β m), the policy's, and p = σ(η Δ), the judge's.

    m is the margin in nats and Δ the gap in the judge's units. The names of the two KLs are NeMo-Aligner's.

    Args:
        beta: strength of the implicit reward, per nat.
        eta: η, implicit reward per unit of the judge's.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Sun et al. 2025, https://arxiv.org/abs/2502.00203 (RPO-fwd).
    """

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B] nats."""
        return _bernoulli_kl(self.beta * m, self.eta * gap)


def _bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(σ(p) ‖ σ(q)), elementwise, in nats."""
    one = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
    return one + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))


class DistilledDPO(GapLoss):
    r"""Distilled DPO, (Δ - β m)²: the implicit reward gap becomes the judge's.

    m is the margin in nats and Δ the gap in the judge's units.

    Args:
        beta: strength of the implicit reward, per nat.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Fisch et al. 2024, https://arxiv.org/abs/2405.19316, its pairwise distillation loss.
    """

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B], the judge's units squared."""
        return (gap - self.beta * m) ** 2


class REBEL(GapLoss):
    r"""REBEL, (m / η - Δ)²: one regression of the relative reward, with the reference as the policy before it.

    m is the margin in nats and Δ the gap in the judge's units. With ``--model.reference Synchronised`` at alpha 1, the
    reference is the policy of some steps ago, as in the paper's iterations.

    Args:
        eta: η, nats per unit of the judge's rewards.
        distance: how far a reward is from the goal, absolute or squared.

    The implicit reward is the log-ratio / η.
    Source: Gao et al. 2024, https://arxiv.org/abs/2404.16767, algorithm 1.
    """

    def __init__(self, eta: float = 1.0, distance: Distance = "absolute") -> None:
        super().__init__(1 / above_zero(self, "eta", eta), distance)
        self.eta = eta

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B], the judge's units squared."""
        return (m / self.eta - gap) ** 2


class GapWeightedDPO(GapLoss):
    r"""DPO weighted by the gap, -Δ log σ(β m): a pair counts as much as chosen is better.

    m is the margin in nats and Δ the gap in the judge's units.

    Args:
        beta: strength of the implicit reward, per nat.
        distance: how far a reward is from the goal, absolute or squared.

    Source: the scaled Bradley-Terry loss of Wang et al. 2024 (HelpSteer2-Preference), https://arxiv.org/abs/2410.01257,
    with β m as the model's reward.
    """

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B], nats times the judge's units."""
        return -gap * F.logsigmoid(self.beta * m)


class SoftLabelDPO(GapLoss):
    r"""DPO with soft labels, -p log σ(β m) - (1 - p) log σ(-β m), p = σ(Δ / T) by Bradley and Terry.

    m is the margin in nats and Δ the gap in the judge's units. RPOBackwardKL at η = 1 / T plus the entropy of p: the
    same gradients. With ``distance`` squared p is σ((|g - r_l|² - |g - r_w|²) / T), the label under the paper's
    -(g - r)².

    Args:
        beta: strength of the implicit reward, per nat.
        temperature: T, in the judge's units.
        distance: how far a reward is from the goal, absolute or squared.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7, its hard label replaced by their
    equation 1.
    """

    def __init__(self, beta: float = 0.1, temperature: float = 1.0, distance: Distance = "absolute") -> None:
        super().__init__(beta, distance)
        self.temperature = above_zero(self, "temperature", temperature)

    def compare(self, m: Tensor, gap: Tensor) -> Tensor:
        """[B] nats."""
        return cross_entropy(torch.sigmoid(gap / self.temperature), self.beta * m)
