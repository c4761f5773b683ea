"""Means over pairs, kept as sums and counts: exact over epochs, accumulated batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

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


class PairMetrics:
    """Weighted means of the quantities in :data:`NAMES`, overall and by origin (``rewards/margins/chosen-goal``).

    A pair whose implicit rewards are equal counts as half right. ``tokens`` and ``pairs`` are totals.

    Args:
        terms: names of the loss's own terms, logged as ``loss/NAME``.
    """

    def __init__(self, terms: Iterable[str] = ()) -> None:
        self.terms = tuple(terms)
        self.names = NAMES + tuple(f"loss/{term}" for term in self.terms)
        # float64: an epoch's sum of log-probabilities outgrows float32. A plain object and no torchmetrics.Metric:
        # "-true" precisions convert all modules below a LightningModule
        self.sums = torch.zeros(len(ORIGINS), len(self.names), dtype=torch.float64)
        self.counts = torch.zeros(len(ORIGINS), dtype=torch.float64)
        self.token_count = torch.zeros((), dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        floats = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.sums, self.counts = self.sums.to(device, floats), self.counts.to(device, floats)
        self.token_count = self.token_count.to(device)

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

    def compute(self) -> dict[str, float]:
        """Return name to mean over all ranks; every rank must call it.

        Origins without pairs are left out. Before the first pair the result is empty.
        """
        totals = {name: over_ranks(value).cpu() for name, value in self.state_dict().items()}
        sums, counts = totals["sums"], totals["counts"]
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
        result["tokens"] = float(totals["token_count"])
        return result

    def reset(self) -> None:
        """Set all sums to 0."""
        for value in (self.sums, self.counts, self.token_count):
            value.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of this rank's sums since the last reset."""
        return {"sums": self.sums.clone(), "counts": self.counts.clone(), "token_count": self.token_count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace this rank's sums.

        Raises:
            ValueError: the sums are of a loss with other terms.
        """
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"expected sums of shape {tuple(self.sums.shape)}, found {tuple(state['sums'].shape)}")
        self.sums.copy_(state["sums"])
        self.counts.copy_(state["counts"])
        self.token_count.copy_(state["token_count"])
