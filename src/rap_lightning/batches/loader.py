"""A DataLoader that knows where it stands, so that a run can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from rap_lightning.batches.dataset import EncodedPairs
from rap_lightning.batches.layouts import Collate
from rap_lightning.batches.sampler import StepSampler
from rap_lightning.batches.types import Batch


class PairLoader(DataLoader[Batch]):
    """Batches of an :class:`EncodedPairs` as a :class:`StepSampler` plans them.

    ``state_dict`` counts the batches handed out in this epoch; Lightning saves it with every checkpoint and gives it
    back before the resumed epoch starts.
    """

    def __init__(self, pairs: EncodedPairs, sampler: StepSampler, collate: Collate, **options: Any) -> None:
        # batch_size None: the sampler yields whole batches, so torch must not group them again
        super().__init__(pairs, batch_size=None, sampler=sampler, collate_fn=collate, **options)
        self.plan = sampler
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.done = self.plan.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this epoch."""
        return {"batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after that many batches; a finished epoch starts anew."""
        self.plan.start = state["batches"] % max(len(self.plan), 1)
