"""Losses made of other losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.errors import ConfigError
from rap_lightning.losses.base import PreferenceLoss
from rap_lightning.losses.margin import DPO


class _Combined(PreferenceLoss):
    """A loss of losses: it requires what its parts require; its implicit rewards are those of the first part."""

    def __init__(self, losses: list[PreferenceLoss]) -> None:
        nn.Module.__init__(self)
        self.losses = nn.ModuleList(losses)
        self.requires = frozenset().union(*(loss.requires for loss in losses))
        self.least_pairs = max(loss.least_pairs for loss in losses)
        self.batch_level = _joined((loss, loss.batch_level) for loss in losses)
        self.at_zero_margin = _joined((loss, loss.at_zero_margin) for loss in losses)

    @property
    def parts(self) -> list[PreferenceLoss]:
        """The losses, typed."""
        return [loss for loss in self.losses if isinstance(loss, PreferenceLoss)]

    def per_pair(self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None) -> Tensor:
        """Return [B]; parts that require no reference or rewards do not get them."""
        return self(policy, reference, rewards)  # type: ignore[no-any-return]

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Return those of the first part: the parts' units differ, so a sum has no meaning."""
        return self.parts[0].implicit_rewards(policy, reference)

    def after_step(self) -> None:
        for loss in self.parts:
            loss.after_step()

    def forget_step(self) -> None:
        for loss in self.parts:
            loss.forget_step()


def _joined(reasons: Iterable[tuple[PreferenceLoss, str]]) -> str:
    """Join the parts' reasons, each after its class."""
    return "; ".join(f"{type(loss).__name__}: {reason}" for loss, reason in reasons if reason)


class Mixture(_Combined):
    r"""A weighted sum of losses, Σ_k w_k L_k, each logged as loss/NAME before its weight.

    MPO is 0.8 DPO + 0.2 BCO + 1.0 SFT (``configs/loss/mpo.yaml``). The implicit reward is that of the first loss.

    Args:
        losses: the losses, each with its own options.
        weights: one for each, none below 0; by default all 1.

    Source: Wang et al. 2024 (MPO), https://arxiv.org/abs/2411.10442.
    """

    def __init__(self, losses: list[PreferenceLoss], weights: list[float] | None = None) -> None:
        if not losses:
            raise ConfigError("Mixture: losses is empty; name at least one.")
        weights = [1.0] * len(losses) if weights is None else weights
        if len(weights) != len(losses):
            raise ConfigError(f"Mixture: {len(losses)} losses but {len(weights)} weights; give one weight for each.")
        if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < float("inf"):
            raise ConfigError(f"Mixture: weights must be 0 or more and sum to more than 0, found {weights}")
        super().__init__(losses)
        self.weights = weights
        self._terms: dict[str, Tensor] = {}

    def forward(self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None = None) -> Tensor:
        """[B], in the units of the parts."""
        values = [loss.per_pair(policy, reference, rewards) for loss in self.parts]
        names = list(self._names())
        self._terms = {name: value.detach() for name, value in zip(names, values, strict=True)}
        for name, loss in zip(names, self.parts, strict=True):
            self._terms |= {f"{name}/{term}": own for term, own in loss.terms().items()}
        return torch.stack([w * value for w, value in zip(self.weights, values, strict=True)]).sum(0)

    def terms(self) -> dict[str, Tensor]:
        """Return each loss of the last forward, before its weight, and its own terms."""
        return self._terms

    def term_names(self) -> Iterable[str]:
        """Return the classes' names, numbered where repeated (DPO, DPO-2), and their own terms (DPO/NAME)."""
        for name, loss in zip(self._names(), self.parts, strict=True):
            yield name
            yield from (f"{name}/{term}" for term in loss.term_names())

    def _names(self) -> Iterable[str]:
        seen: Counter[str] = Counter()
        for loss in self.parts:
            name = type(loss).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name}-{seen[name]}"

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class WPO(_Combined):
    r"""WPO, another loss weighted by how likely the policy is to write the pair: w(y_w) w(y_l) L.

    w(y) = exp(1/|y| Σ_t (log π(y_t) - log Σ_v π(v)²)), without gradient: the response's probability per token over the
    one that a sample of the policy would have on average (the paper's sampled alignment).

    Args:
        loss: the loss that is weighted; it must not compare the pairs of a batch.

    The implicit reward is that of the weighted loss.
    Source: Zhou et al. 2024, https://arxiv.org/abs/2406.11827, equation 2, with its sampled alignment.
    """

    def __init__(self, loss: PreferenceLoss = DPO()) -> None:  # noqa: B008 (jsonargparse makes a new one)
        if loss.batch_level:
            raise ConfigError(
                f"WPO weights single pairs, and {type(loss).__name__} compares the pairs of a batch "
                f"({loss.batch_level}). Choose another loss."
            )
        super().__init__([loss])
        self.requires |= {"tokens", "collisions"}

    def forward(self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None = None) -> Tensor:
        """[B], in the units of the weighted loss."""
        return self.pair_weights(policy) * self.parts[0].per_pair(policy, reference, rewards)

    def terms(self) -> dict[str, Tensor]:
        """Return the weighted loss's own terms, before its weights."""
        return self.parts[0].terms()

    def term_names(self) -> Iterable[str]:
        """Return the names of the weighted loss's own terms."""
        return self.parts[0].term_names()

    @torch.no_grad()
    def pair_weights(self, policy: PairLogps) -> Tensor:
        """Return w(y_w) w(y_l), [B]."""
        tokens = policy.tokens
        assert tokens is not None, "WPO needs token log-probabilities"
        assert tokens.log_collisions is not None, "WPO needs collision probabilities"
        aligned = tokens.logps - tokens.log_collisions
        sums = aligned.new_zeros(2 * len(policy.chosen)).index_add(0, tokens.segment, aligned)
        return torch.exp(sums[0::2] / policy.chosen_lengths + sums[1::2] / policy.rejected_lengths)
