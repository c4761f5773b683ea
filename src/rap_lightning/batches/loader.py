"""A DataLoader that can start in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from rap_lightning.batches.dataset import EncodedPairs
from rap_lightning.batches.layouts import Collate
from rap_lightning.batches.sampler import StepSampler
from rap_lightning.batches.stream import StreamedPairs
from rap_lightning.batches.types import Batch
from rap_lightning.errors import UserError


class PairLoader(DataLoader[tuple[Batch, ...]]):
    """Batches of training pairs; each is a tuple of forward passes.

    Args:
        pairs: the training pairs.
        collate: lays them out.
        position: (epoch, batches of it that a resumed run has already trained on); called when an iteration starts.
        sampler: plans the batches of :class:`EncodedPairs`; a stream plans its own.
        options: of the DataLoader.
    """

    def __init__(
        self, pairs: EncodedPairs | StreamedPairs, collate: Collate, position: Callable[[], tuple[int, int]],
        sampler: StepSampler | None = None, **options: Any,
    ) -> None:  # fmt: skip
        # batch_size None: the sampler yields whole batches, so torch must not group them again
        super().__init__(pairs, batch_size=None, sampler=sampler, collate_fn=collate, **options)  # type: ignore[arg-type]
        self.pairs, self.position = pairs, position
        self.started: tuple[int, int] | None = None  # the position at which the last iteration started

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:  # type: ignore[override]
        epoch, done = self.started = self.position()
        if isinstance(self.pairs, StreamedPairs):
            self.pairs.epoch, self.pairs.start = epoch, done
        elif isinstance(self.sampler, StepSampler):  # its epoch is set by Lightning
            self.sampler.start = done
        yield from unwrap_worker_error(super().__iter__())

    @property
    def accumulate(self) -> int | None:
        """Batches per optimizer step that the weights of pairs were planned for; None in evaluation."""
        if isinstance(self.pairs, StreamedPairs):
            return self.pairs.shape.accumulate
        return self.sampler.accumulate if isinstance(self.sampler, StepSampler) else None

    def whole(self) -> PairLoader:
        """This loader, from the beginning of the epoch even in a resumed run."""
        self.position = lambda: (0, 0)
        return self

    # Lightning takes a loader with these two methods for one that can resume. The position itself belongs to the
    # trainer, which alone knows which batches have become whole optimizer steps (rap_lightning.training.run_state).

    def state_dict(self) -> dict[str, int]:
        """Empty: the trainer's progress holds the position."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See ``state_dict``."""


def unwrap_worker_error(batches: Iterable[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
    """Batches; an error of ours in a worker is raised with its own text, without the worker's traceback around it."""
    try:
        yield from batches
    except UserError as error:
        before, found, text = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
        if not found or "in DataLoader worker" not in before:
            raise
        raise type(error)(text.strip()) from None
