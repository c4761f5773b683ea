"""Losses without a reference; none is loaded. s is a response's mean log-probability per token, in nats."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps
from rap_lightning.losses.base import PreferenceLoss, above_zero, bounded_exp


def per_token(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the mean log-probability per token of chosen and of rejected, each [B], in nats."""
    return policy.chosen / policy.chosen_lengths, policy.rejected / policy.rejected_lengths


class SimPO(PreferenceLoss):
    r"""SimPO, -log σ(β (s_w - s_l) - γ), where s is the response's mean log-probability per token.

    Args:
        beta: strength of the mean log-probability, per nat.
        gamma: the margin γ that chosen must win by, in the units of β s. The paper tunes γ / β; 0.5 is its usual start.

    The implicit reward is β s, without γ. Source: Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6.

    >>> policy = PairLogps.from_segments(torch.tensor([-4.0, -6.0]), torch.tensor([4, 2]))
    >>> SimPO(beta=2.0, gamma=1.0)(policy)  # -log σ(2 (-1 + 3) - 1)
    tensor([0.0486])
    """

    requires = frozenset()

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__(beta)
        self.gamma = gamma

    def forward(self, policy: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, None)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β times the mean log-probability per token."""
        chosen, rejected = per_token(policy)
        return self.beta * chosen, self.beta * rejected


class AlphaPO(PreferenceLoss):
    r"""AlphaPO, SimPO with a reward of another shape: -log σ(r_w - r_l - γ), r = β (1 - e^(-α s)) / α.

    s is the response's mean log-probability per token. Beyond e^30 the exponential is continued by its tangent.

    Args:
        beta: strength of the reward.
        gamma: the margin γ that chosen must win by, in the units of r.
        alpha: α, the shape; not 0, which is SimPO. Above 0 the reward falls steeply for unlikely responses.

    The implicit reward is r, without γ.
    Source: Gupta et al. 2025, https://arxiv.org/abs/2501.03884; defaults: Mistral-Instruct in table 3, as TRL
    records it, its 0.1 read as γ / β.
    """

    requires = frozenset()

    def __init__(self, beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25) -> None:
        super().__init__(beta)
        self.gamma = gamma
        self.alpha = alpha if alpha < 0 else above_zero(self, "alpha", alpha)

    def forward(self, policy: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, None)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β (1 - e^(-α s)) / α."""
        chosen, rejected = ((1 - bounded_exp(-self.alpha * s)) / self.alpha for s in per_token(policy))
        return self.beta * chosen, self.beta * rejected


class CPO(PreferenceLoss):
    r"""CPO, -log σ(β (log π(y_w) - log π(y_l))) - w s_w: DPO with a uniform reference, and imitation of chosen.

    log π is summed over tokens, in nats; s_w is chosen's mean log-probability per token. The paper writes a sum over
    tokens there; TRL takes the mean over all tokens of the batch, this class the mean over each response's.

    Args:
        beta: strength of the implicit reward, per nat.
        nll_weight: w, of the imitation term; 0 leaves it out.

    The implicit reward is β log π. Source: Xu et al. 2024, https://arxiv.org/abs/2401.08417, equations 3 to 5.
    """

    requires = frozenset()

    def __init__(self, beta: float = 0.1, nll_weight: float = 1.0) -> None:
        super().__init__(beta)
        self.nll_weight = nll_weight if nll_weight == 0 else above_zero(self, "nll_weight", nll_weight)

    def forward(self, policy: PairLogps) -> Tensor:
        """[B] nats."""
        return -F.logsigmoid(self.beta * (policy.chosen - policy.rejected)) - self.nll_weight * per_token(policy)[0]

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """β times the summed log-probability."""
        return self.beta * policy.chosen, self.beta * policy.rejected


class ORPO(PreferenceLoss):
    r"""ORPO, -s_w - λ log σ(o_w - o_l): imitation of chosen and the log of the odds ratio, o = s - log(1 - e^s).

    s is the response's mean log-probability per token. (TRL imitates the prompt's tokens too.)

    Args:
        odds_weight: λ, of the odds ratio.

    The implicit reward is the log odds o, without λ.
    Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691, equations 4 to 7; λ as for Mistral.
    """

    requires = frozenset()

    def __init__(self, odds_weight: float = 0.1) -> None:
        nn.Module.__init__(self)
        self.odds_weight = above_zero(self, "odds_weight", odds_weight)

    def forward(self, policy: PairLogps) -> Tensor:
        """[B] nats."""
        chosen, rejected = self.implicit_rewards(policy, None)
        return -per_token(policy)[0] - self.odds_weight * F.logsigmoid(chosen - rejected)

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """The log odds of the mean probability per token."""
        chosen, rejected = (_log_odds(s) for s in per_token(policy))
        return chosen, rejected


def _log_odds(s: Tensor) -> Tensor:
    s = s.clamp(max=-torch.finfo(s.dtype).eps)  # a certain response has infinite odds
    return s - torch.log(-torch.expm1(s))


class SFT(PreferenceLoss):
    r"""Imitation of the chosen response, -s_w: its mean negative log-probability per token.

    The mean is over the tokens of each response; TRL's is over all tokens of the batch, so long responses weigh more.
    The implicit reward is s, also of rejected, so that the logs show the effect of imitation on the margin.

    Source: the usual cross-entropy; as part of a mixture: Wang et al. 2024 (MPO), https://arxiv.org/abs/2411.10442.
    """

    requires = frozenset()
    at_zero_margin = "it imitates chosen and ignores rejected"

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, policy: PairLogps) -> Tensor:
        """[B] nats per token."""
        return -per_token(policy)[0]

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """The mean log-probability per token."""
        return per_token(policy)
