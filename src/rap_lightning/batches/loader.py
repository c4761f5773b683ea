"""A DataLoader that can begin in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from rap_lightning.batches.dataset import EncodedPairs
from rap_lightning.batches.layouts import Collate
from rap_lightning.batches.sampler import StepSampler
from rap_lightning.batches.types import Batch
from rap_lightning.errors import UserError


def plainly(batches: Iterable[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
    """Batches; an error of ours in a worker is raised with its own text, without the worker's stack around it."""
    try:
        yield from batches
    except UserError as error:
        before, found, text = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
        if not found or "in DataLoader worker" not in before:
            raise
        raise type(error)(text.strip()) from None


class PairLoader(DataLoader[tuple[Batch, ...]]):
    """Batches of an :class:`EncodedPairs` as a :class:`StepSampler` plans them.

    Args:
        pairs: the training pairs.
        sampler: plans the batches.
        collate: lays them out.
        skip: batches of the epoch that a resumed run has behind it; asked when the first batch is.
        options: of the DataLoader.
    """

    def __init__(
        self, pairs: EncodedPairs, sampler: StepSampler, collate: Collate, skip: Callable[[], int], **options: Any
    ) -> None:
        # batch_size None: the sampler yields whole batches, so torch must not group them again
        super().__init__(pairs, batch_size=None, sampler=sampler, collate_fn=collate, **options)  # type: ignore[arg-type]
        self.plan, self.skip = sampler, skip

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:  # type: ignore[override]
        self.plan.start = self.skip()
        yield from plainly(super().__iter__())

    def whole(self) -> PairLoader:
        """This loader, from the epoch's beginning whatever a resumed run has behind it."""
        self.skip = lambda: 0
        return self

    # Lightning takes a loader with these two for resumable. The position itself is the trainer's to keep: it alone
    # knows which batches have become whole optimizer steps (rap_lightning.training.run_state).

    def state_dict(self) -> dict[str, int]:
        """Nothing beyond what the trainer's own progress says."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See ``state_dict``."""
