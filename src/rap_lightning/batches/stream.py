"""Training pairs from data larger than disk, one at a time.

Every process reads the same stream in the same order, and encodes only its own batches. Reading is cheap compared to
encoding. So the batches are the same for any number of workers, all ranks know the size of each step, the last one
included, and a resumed run continues where it stopped.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from rap_lightning.batches.dataset import Example, PairEncoder, example_of, note_encoding
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabelling import ORIGINS
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.source_mix import stream_mixed
from rap_lightning.preferences.sources import Source

log = logging.getLogger("rap_lightning")


class Item(NamedTuple):
    """A scored pair, and one of the training pairs that it becomes: its place among them, and its origin."""

    pair: Pair
    place: int
    origin: int


@dataclass(frozen=True)
class StepShape:
    """How an optimizer step is split into batches: as for :class:`rap_lightning.batches.sampler.StepSampler`."""

    batch_size: int
    accumulate: int = 1
    num_replicas: int = 1
    rank: int = 0

    @property
    def width(self) -> int:
        """Pairs that all ranks process at once."""
        return self.batch_size * self.num_replicas

    @property
    def pairs(self) -> int:
        return self.width * self.accumulate


class StreamedPairs(IterableDataset[Any]):
    """Planned batches of examples, as :class:`rap_lightning.batches.dataset.EncodedPairs` gives them, from a stream.

    ``buffer`` training pairs are shuffled among each other; 1 keeps the order.
    """

    def __init__(
        self, sources: list[Source], split: str, rules: Rules, encode: PairEncoder, shape: StepShape,
        *, buffer: int, seed: int, origin_weights: Sequence[float] = (1.0,) * len(ORIGINS),
    ) -> None:  # fmt: skip
        self.sources, self.split, self.rules, self.encode, self.shape = sources, split, rules, encode, shape
        self.buffer, self.seed = buffer, seed
        self.origin_weights = tuple(origin_weights)
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[BatchPlan, list[Example]]]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        names = ", ".join(source.path for source in self.sources)
        read = DataReport(names, self.split)  # of every row: each process reads them all
        encoded = DataReport(names, f"{self.split} (training pairs encoded by worker {own} of rank {self.shape.rank})")
        try:
            for number, (items, step) in enumerate(self._shares(read)):
                if number >= self.start and (number - self.start) % workers == own:
                    yield self._encoded(items, step, encoded)
        finally:  # most streams are not read to their end
            reports = [read, encoded] if own == 0 and self.shape.rank == 0 else [encoded]
            if lines := [line for report in reports for line in report.lines() if line.startswith(" ")]:
                log.warning("stream %s:\n%s", names, "\n".join(lines))

    def _shares(self, report: DataReport) -> Iterator[tuple[list[Item], list[Item]]]:
        """Yield this rank's items of what all ranks process at once, and the items of the whole step."""
        shape, items = self.shape, self._shuffled(report)
        while step := list(islice(items, shape.pairs)):
            for first in range(0, len(step), shape.width):
                yield step[first + shape.rank * shape.batch_size :][: shape.batch_size], step

    def _shuffled(self, report: DataReport) -> Iterator[Item]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        held: list[Item] = []
        for pair in stream_mixed(self.sources, self.split, self.rules, report, self.seed):
            for place, made in enumerate(self.rules.relabelling.made_of(pair, self.rules.goal)):
                held.append(Item(pair, place, made.origin))
                if len(held) >= self.buffer:
                    place = rng.randrange(len(held))
                    held[place], held[-1] = held[-1], held[place]
                    yield held.pop()
        rng.shuffle(held)
        yield from held

    def _encoded(self, items: list[Item], step: list[Item], report: DataReport) -> tuple[BatchPlan, list[Example]]:
        weight = 1.0 if items else 0.0
        items = items or step[:1]
        rows = self.encode([item.pair for item in items])
        examples = [
            example_of(row, item.place)
            for item, row, good in zip(items, rows, note_encoding(rows, report), strict=True)
            if good
        ]
        if not examples:  # every rank must run every batch, so a pair of weight 0 fills this one
            examples, weight = [next(self._fillers())], 0.0
        places = tuple(range(len(examples)))
        # Other ranks can't know that a pair was dropped here, so the step's mean is over the pairs that were planned.
        return BatchPlan(
            places, (weight,) * len(examples), len(step), (places,),
            tuple(weight * e.weight * self.origin_weights[e.origin] for e in examples),
            math.fsum(item.pair.weight * self.origin_weights[item.origin] for item in step),
        ), examples  # fmt: skip

    def _fillers(self) -> Iterator[Example]:
        for item in self._shuffled(DataReport("", "")):
            row = self.encode([item.pair])[0]
            if not row["dropped"]:
                yield example_of(row, item.place)
