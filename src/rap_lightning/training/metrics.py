"""Means over pairs as sums and counts, so that they are exact over epochs, accumulated batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from rap_lightning.batches.types import PairLogps
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
        super().__init__()
        self.terms = tuple(terms)
        self.names = NAMES + tuple(f"loss/{term}" for term in self.terms)
        # float64: an epoch's sum of log-probabilities outgrows float32
        self.add_state("sums", torch.zeros(len(ORIGINS), len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(ORIGINS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("token_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(
        self, losses: Tensor, rewards: tuple[Tensor, Tensor], policy: PairLogps, origin: Tensor, weights: Tensor,
        tokens: Tensor, terms: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add a batch: [B] losses, implicit rewards of chosen and rejected, log-probs, origins, weights; its tokens.

        ``terms`` are the loss's own, [B] each; a term that isn't there (another step was taken) is logged as nan.
        """
        chosen, rejected = rewards
        margins = chosen - rejected
        values = torch.stack(
            [
                losses, chosen, rejected, margins, (margins.sign() + 1) / 2, policy.chosen, policy.rejected,
                policy.chosen_lengths, policy.rejected_lengths,
                *((terms or {}).get(term, torch.full_like(losses, torch.nan)) for term in self.terms),
            ],
            dim=1,
        ).double()  # fmt: skip
        weights = weights.double()
        self.sums.index_add_(0, origin, values.detach() * weights[:, None])
        self.counts.index_add_(0, origin, weights)
        self.token_count += tokens

    def compute(self) -> dict[str, float]:
        """Name to mean. Origins without pairs are left out; everything is, before the first pair."""
        sums, counts = self.sums.cpu(), self.counts.cpu()
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
        result["tokens"] = float(self.token_count)
        return result

    def sums_so_far(self) -> dict[str, Tensor]:
        """What this rank has added up since the last reset, as copies."""
        return {name: getattr(self, name).clone() for name in ("sums", "counts", "token_count")}

    def go_on_from(self, state: dict[str, Tensor]) -> None:
        """Replace what has been added up by what ``sums_so_far`` gave.

        Raises:
            ValueError: it is of another loss, with other terms.
        """
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"expected sums of shape {tuple(self.sums.shape)}, found {tuple(state['sums'].shape)}")
        self.reset()
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self._update_count = 1  # torchmetrics warns of a compute before any update

    def _apply(self, fn: Any, exclude_state: Any = "") -> Any:
        # Lightning's half-precision plugins convert modules; sums must stay float64
        self.sums, self.counts = self.sums.float(), self.counts.float()
        result = super()._apply(fn, exclude_state)
        if self.sums.device.type != "mps":  # which has no float64
            self.sums, self.counts = self.sums.double(), self.counts.double()
            for name in ("sums", "counts"):  # what reset() goes back to
                self._defaults[name] = self._defaults[name].double()  # type: ignore[union-attr]
        return result
