r"""f-DPO, -log σ(β f'(e^a) - β f'(e^b)): DPO under another divergence between policy and reference than reverse KL.

a and b are the log-ratios of chosen and rejected in nats. With the reverse KL, f'(u) = log u + 1 and f-DPO is DPO.
Where f' grows exponentially it is continued by its tangent beyond e^30, so that no value overflows.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240, the f-DPO objective and table 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, between, bounded_exp, logratios


class DivergenceDPO(PreferenceLoss):
    """-log σ(β f'(e^a) - β f'(e^b)); a subclass defines f' (``slope``).

    Args:
        beta: strength of the implicit reward.
    """

    @abstractmethod
    def slope(self, logratio: Tensor) -> Tensor:
        """Return f'(e^logratio), elementwise, up to a constant."""

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, reference)
        return -F.logsigmoid(chosen - rejected)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β f'(ratio of policy and reference), 0 where the two agree."""
        assert reference is not None, "f-DPO needs a reference"
        chosen, rejected = logratios(policy, reference)
        return self.beta * self.slope(chosen), self.beta * self.slope(rejected)


class ForwardKLDPO(DivergenceDPO):
    r"""f-DPO with the forward KL, -log σ(β (e^-b - e^-a)): f'(u) = -1 / u.

    a and b are the log-ratios of chosen and rejected in nats.

    Args:
        beta: strength of the implicit reward.

    The implicit reward is β (1 - e^-logratio). Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240, table 1.
    """

    def slope(self, logratio: Tensor) -> Tensor:
        """1 - e^-logratio."""
        return 1 - bounded_exp(-logratio)


class JensenShannonDPO(DivergenceDPO):
    r"""f-DPO with the Jensen-Shannon divergence, -log σ(β (log σ(a) - log σ(b))): f'(u) = log(2u / (1 + u)).

    a and b are the log-ratios of chosen and rejected in nats.

    Args:
        beta: strength of the implicit reward.

    The implicit reward is β (log 2 + log σ(logratio)), at most β log 2.
    Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240, table 1.
    """

    def slope(self, logratio: Tensor) -> Tensor:
        """log 2 + log σ(logratio)."""
        return math.log(2) + F.logsigmoid(logratio)


class AlphaDPO(DivergenceDPO):
    r"""f-DPO with an α-divergence, -log σ(β (e^(-α b) - e^(-α a)) / α): f'(u) = (1 - u^-α) / α.

    a and b are the log-ratios of chosen and rejected in nats.

    Args:
        beta: strength of the implicit reward.
        alpha: α, between 0 (in the limit the reverse KL) and 1 (the forward KL).

    The implicit reward is β (1 - e^(-α logratio)) / α.
    Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240, table 1.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.5) -> None:
        super().__init__(beta)
        self.alpha = between(self, "alpha", alpha, 0, 1, with_low=False)

    def slope(self, logratio: Tensor) -> Tensor:
        """(1 - e^(-α logratio)) / α."""
        return (1 - bounded_exp(-self.alpha * logratio)) / self.alpha
