"""Losses for single responses labelled good or bad, applied to pairs: each is compared with a running mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, above_zero, live, over_ranks


class BCO(PreferenceLoss):
    r"""BCO on pairs, -log σ(β a - δ) - log σ(-(β b - δ)), where δ is the mean implicit reward so far.

    a and b are the log-ratios of chosen and rejected in nats. δ averages the rewards of both responses over all pairs
    of the optimizer steps before this one, on all ranks; it is part of the checkpoint. A mean that included the current
    batch, as in earlier releases of TRL, would depend on gradient accumulation.

    Args:
        beta: strength of the implicit reward, per nat.

    Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656, section 4; β as in section C.
    """

    totals: Tensor

    def __init__(self, beta: float = 0.01) -> None:
        super().__init__(beta)
        self.register_buffer("totals", torch.zeros(2, dtype=torch.float64))  # sum of rewards, their number
        self._pending: Tensor | None = None  # no buffer: DDP would overwrite it with rank 0's

    @property
    def delta(self) -> Tensor:
        """δ, [] float32; it is 0 before the first step."""
        return (self.totals[0] / self.totals[1].clamp(min=1)).float()

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        if self.training:
            rewards = torch.cat((chosen[live(policy)], rejected[live(policy)])).detach().to(self.totals)
            seen = torch.stack((rewards.sum(), rewards.new_full((), len(rewards))))
            self._pending = seen if self._pending is None else self._pending + seen
        return -F.logsigmoid(chosen - self.delta) - F.logsigmoid(self.delta - rejected)

    def after_step(self) -> None:
        """Add the step's rewards, of all ranks, to δ."""
        pending = torch.zeros_like(self.totals) if self._pending is None else self._pending
        self.totals += over_ranks(pending)
        self._pending = None

    def forget_step(self) -> None:
        self._pending = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        result: Any = super()._apply(fn, recurse)
        if self.totals.device.type != "mps":  # which has no float64
            self.totals = self.totals.double()  # "-true" precisions convert modules; a count must stay exact
        return result  # type: ignore[no-any-return]


class KTO(PreferenceLoss):
    r"""KTO on pairs, λ_D (1 - σ(β (a - z))) + λ_U (1 - σ(β (z - b))), with z an estimate of KL(policy ‖ reference).

    a and b are the log-ratios of chosen and rejected in nats. z = max(0, mean log-ratio of responses to other prompts
    of the batch, over all ranks), without gradient; it is 0 in a batch with a single pair left. It costs another
    forward pass of policy and reference.

    Args:
        beta: strength of the implicit reward, per nat.
        desirable_weight: λ_D, of chosen responses.
        undesirable_weight: λ_U, of rejected responses.

    The implicit reward is β times the log-ratio, without z.
    Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equations 7 and 8. Both halves of a pair are
    added; the paper averages over responses, which is half of it.
    """

    requires = frozenset({"reference", "unrelated"})
    least_pairs = 2
    batch_level = "z is estimated on the batch"

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        super().__init__(beta)
        self.desirable_weight = above_zero(self, "desirable_weight", desirable_weight)
        self.undesirable_weight = above_zero(self, "undesirable_weight", undesirable_weight)

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B], unitless."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        z = self.beta * self.divergence(policy, reference)
        return self.desirable_weight * torch.sigmoid(z - chosen) + self.undesirable_weight * torch.sigmoid(rejected - z)

    @torch.no_grad()
    def divergence(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Return z, [] nats, the same on every rank."""
        assert policy.unrelated is not None, "KTO needs log-probabilities of unrelated responses"
        assert reference.unrelated is not None, "KTO needs log-probabilities of unrelated responses"
        pairs = live(policy)
        if len(pairs) < 2:  # nothing unrelated: this rank adds nothing, but must join the sum over ranks
            pairs = pairs[:0]
        ratios = (policy.unrelated - reference.unrelated).reshape(-1, 2)[pairs]
        total, count = over_ranks(torch.stack((ratios.sum(), ratios.new_full((), ratios.numel()))))
        return (total / count.clamp(min=1)).clamp(min=0)  # type: ignore[no-any-return]
