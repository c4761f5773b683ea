"""Training pairs from data larger than disk, one at a time.

Every process reads the same stream, in the same order, and encodes only the batches that are its own. Reading is cheap
beside encoding, and so the batches are the same for any number of workers, their sizes are known to all ranks at the
end of the stream too, and a resumed run goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rap_lightning.batches.dataset import Example, example_of
from rap_lightning.batches.layouts import Collate
from rap_lightning.batches.loader import plainly
from rap_lightning.batches.pair_encoder import PairEncoder, note_encoding
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.source_mix import stream_mixed
from rap_lightning.preferences.sources import Source

log = logging.getLogger("rap_lightning")

Share = tuple[list[tuple[Pair, int]], list[float], tuple[int, float]]
"""Pairs of a batch with their origins, their weights (0 for a filler), and pairs and weight of the whole step."""


@dataclass(frozen=True)
class StepShape:
    """How an optimizer step is cut into batches: as for :class:`rap_lightning.batches.sampler.StepSampler`."""

    batch_size: int
    accumulate: int = 1
    num_replicas: int = 1
    rank: int = 0

    @property
    def width(self) -> int:
        """Pairs that all ranks see at once."""
        return self.batch_size * self.num_replicas

    @property
    def pairs(self) -> int:
        """Pairs in a full step."""
        return self.width * self.accumulate


class StreamedPairs(IterableDataset[Any]):
    """Planned batches of examples, as :class:`EncodedPairs` gives them, from a stream.

    Args:
        sources: where from.
        split: which.
        rules: what is done with rows.
        encode: makes token ids.
        shape: of the steps.
        buffer: training pairs to shuffle among; 1 keeps the order.
        seed: of the order.
        max_length: tokens of prompt and response together.
        origin_weights: what the loss of a training pair of each origin counts in the mean over its step.
    """

    def __init__(
        self, sources: list[Source], split: str, rules: Rules, encode: PairEncoder, shape: StepShape,
        *, buffer: int, seed: int, max_length: int, origin_weights: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        self.sources, self.split, self.rules, self.encode, self.shape = sources, split, rules, encode, shape
        self.buffer, self.seed, self.max_length = buffer, seed, max_length
        self.origin_weights = tuple(origin_weights)
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[BatchPlan, list[Example]]]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        names = ", ".join(source.path for source in self.sources)
        read = DataReport(names, self.split)  # of every row: each process reads them all
        encoded = DataReport(names, f"{self.split} (training pairs encoded by worker {own} of rank {self.shape.rank})")
        try:
            for number, (items, weights, step) in enumerate(self._batches(read)):
                if number >= self.start and (number - self.start) % workers == own:
                    yield self._encoded(items, weights, step, encoded)
        finally:  # most streams are left before their end
            reports = [read, encoded] if own == 0 and self.shape.rank == 0 else [encoded]
            if lines := [line for report in reports for line in report.lines() if line.startswith(" ")]:
                log.warning("stream %s:\n%s", names, "\n".join(lines))

    def _batches(self, report: DataReport) -> Iterator[Share]:
        shape, step = self.shape, []
        for item in self._shuffled(report):
            step.append(item)
            if len(step) == shape.pairs:
                yield from self._cut(step)
                step = []
        yield from self._cut(step)

    def _cut(self, step: list[tuple[Pair, int]]) -> Iterator[Share]:
        shape = self.shape
        size = (len(step), math.fsum(self.origin_weights[origin] for _, origin in step))
        for first in range(0, len(step), shape.width):
            mine = step[first + shape.rank * shape.batch_size :][: shape.batch_size]
            yield (mine, [1.0] * len(mine), size) if mine else ([step[0]], [0.0], size)

    def _shuffled(self, report: DataReport) -> Iterator[tuple[Pair, int]]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        held: list[tuple[Pair, int]] = []
        for pair in stream_mixed(self.sources, self.split, self.rules, report, self.seed):
            for origin in self.rules.relabelling.origins_of(pair):
                held.append((pair, origin))
                if len(held) >= self.buffer:
                    place = rng.randrange(len(held))
                    held[place], held[-1] = held[-1], held[place]
                    yield held.pop()
        rng.shuffle(held)
        yield from held

    def _encoded(
        self, items: list[tuple[Pair, int]], weights: list[float], step: tuple[int, float], report: DataReport
    ) -> tuple[BatchPlan, list[Example]]:
        examples, kept = [], []
        rows = self.encode([pair for pair, _ in items])
        for (_, origin), row, weight, good in zip(items, rows, weights, note_encoding(rows, report), strict=True):
            if good:
                examples.append(example_of(row, origin, self.rules.relabelling, self.max_length))
                kept.append(weight)
        if not examples:  # every rank must run every batch: a pair of weight 0 stands in
            examples, kept = [next(self._stand_in())], [0.0]
        # the others can't know that a pair was dropped here, so the step's mean is over the pairs that were planned
        places = tuple(range(len(examples)))
        loss_weights = tuple(w * self.origin_weights[e.origin] for w, e in zip(kept, examples, strict=True))
        return BatchPlan(places, tuple(kept), step[0], (places,), loss_weights, step[1]), examples

    def _stand_in(self) -> Iterator[Example]:
        for item in self._shuffled(DataReport("", "")):
            row = self.encode([item[0]])[0]
            if not row["dropped"]:
                yield example_of(row, item[1], self.rules.relabelling, self.max_length)


class StreamLoader(DataLoader[tuple[Batch, ...]]):
    """Batches of a :class:`StreamedPairs`.

    Args:
        pairs: the stream.
        collate: lays batches out.
        position: (epoch, batches of it that a resumed run has behind it); asked when the first batch is.
        options: of the DataLoader.
    """

    def __init__(
        self, pairs: StreamedPairs, collate: Collate, position: Callable[[], tuple[int, int]], **options: Any
    ) -> None:
        super().__init__(pairs, batch_size=None, collate_fn=collate, **options)  # type: ignore[arg-type]
        self.stream, self.position, self.plan = pairs, position, pairs.shape

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:  # type: ignore[override]
        self.stream.epoch, self.stream.start = self.position()
        yield from plainly(super().__iter__())

    def state_dict(self) -> dict[str, int]:
        """Nothing beyond what the trainer's own progress says."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See ``state_dict``."""
