"""Means over pairs, kept as sums and counts: exact over epochs, accumulated batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from rap_lightning.batches.types import Batch, PairLogps
from rap_lightning.losses.base import over_ranks
from rap_lightning.preferences.relabelling import ORIGINS

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
)


class PairMetrics(Metric):
    """Weighted means of the quantities in :data:`NAMES`, overall and by origin (``rewards/margins/chosen-goal``).

    A pair whose implicit rewards are equal counts as half right. ``tokens`` and ``pairs`` are totals.

    Args:
        terms: names of the loss's own terms, logged as ``loss/NAME``.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    token_count: Tensor

    def __init__(self, terms: Iterable[str] = ()) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False)
        self.terms = tuple(terms)
        self.names = NAMES + tuple(f"loss/{term}" for term in self.terms)
        # float64: an epoch's sum of log-probabilities outgrows float32
        sums, counts = torch.zeros(len(ORIGINS), len(self.names)).double(), torch.zeros(len(ORIGINS)).double()
        self.add_state("sums", sums, dist_reduce_fx="sum", persistent=True)
        self.add_state("counts", counts, dist_reduce_fx="sum", persistent=True)
        self.add_state("token_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        self.set_dtype(torch.float64)

    def update(
        self, losses: Tensor, rewards: tuple[Tensor, Tensor], policy: PairLogps, batch: Batch,
        terms: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add a batch.

        Args:
            losses: [B].
            rewards: implicit rewards of chosen and rejected, [B] each.
            policy: the policy's log-probabilities.
            batch: gives each pair's origin and weight, and the number of tokens.
            terms: the loss's own terms, [B] each; a missing one (SFT steps before the loss begins) is logged as nan.
        """
        if self.sums.device != losses.device:
            self.to(losses.device)
        chosen, rejected = rewards
        margins = chosen - rejected
        values = torch.stack(
            [
                losses, chosen, rejected, margins, (margins.sign() + 1) / 2, policy.chosen, policy.rejected,
                policy.chosen_lengths, policy.rejected_lengths,
                *((terms or {}).get(term, torch.full_like(losses, torch.nan)) for term in self.terms),
            ],
            dim=1,
        ).to(self.sums)  # fmt: skip
        weights = batch.weights.to(self.sums)
        self.sums.index_add_(0, batch.origin, values.detach() * weights[:, None])
        self.counts.index_add_(0, batch.origin, weights)
        self.token_count += batch.tokens

    def totals(self) -> Tensor:
        """Return the sums over all ranks as one flat float64 tensor, for :meth:`means`; every rank must call it."""
        return over_ranks(torch.cat((self.sums.flatten(), self.counts, self.token_count[None].to(self.sums))))

    def means(self, totals: Tensor) -> dict[str, float]:
        """Return name to mean, of what :meth:`totals` returned, on the host.

        Origins without pairs are left out. Before the first pair the result is empty.
        """
        flat, counts, tokens = totals.split([self.sums.numel(), len(ORIGINS), 1])
        sums = flat.view(self.sums.shape)
        result: dict[str, float] = {}
        if not counts.sum():
            return result
        for name, value in zip(self.names, sums.sum(0) / counts.sum(), strict=True):
            result[name] = float(value)
        if (counts > 0).sum() > 1:
            for i, origin in enumerate(ORIGINS):
                if counts[i]:
                    result |= {f"{n}/{origin}": float(v) for n, v in zip(self.names, sums[i] / counts[i], strict=True)}
        result["pairs"] = float(counts.sum())
        result["tokens"] = float(tokens)
        return result

    def compute(self) -> dict[str, float]:
        """Return name to mean over all ranks, copied from the device at once; every rank must call it."""
        return self.means(self.totals().cpu())

    def resume(self, state: dict[str, Tensor]) -> None:
        """Take over sums of an earlier ``state_dict``.

        Raises:
            ValueError: the sums are of a loss with other terms.
        """
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"expected sums of shape {tuple(self.sums.shape)}, found {tuple(state['sums'].shape)}")
        self.load_state_dict({name: value.to(self.sums.device, copy=True) for name, value in state.items()})
