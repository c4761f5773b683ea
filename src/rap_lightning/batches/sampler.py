"""Which pairs stand in which batch.

Batches are planned per optimizer step, so that an epoch is complete, deterministic, and the mean over a step is a mean
over its pairs, however they are spread over ranks and accumulated batches, and however many the last step has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one rank: its pairs, their weights (0 for a filler), and the pairs in the whole optimizer step."""

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    step_pairs: int


class StepSampler(DistributedSampler[BatchPlan]):
    """Yields :class:`BatchPlan`; a ``DistributedSampler``, so that Lightning leaves it in place and sets its epoch.

    Args:
        size: training pairs in all.
        batch_size: pairs per rank and batch.
        accumulate: batches per optimizer step.
        num_replicas, rank: of this process.
        shuffle: another order each epoch, from ``seed`` and the epoch alone.
        seed: of the order.

    A rank that has no pair left in the last step gets one filler of weight 0: every rank runs as many batches.
    """

    def __init__(
        self, size: int, batch_size: int, *, accumulate: int = 1, num_replicas: int = 1, rank: int = 0,
        shuffle: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.batch_size, self.accumulate = size, batch_size, accumulate
        self.start = 0

    @property
    def pairs_per_step(self) -> int:
        """Pairs in a full optimizer step, over all ranks."""
        return self.batch_size * self.accumulate * self.num_replicas

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.pairs_per_step)
        return full * self.accumulate + math.ceil(rest / (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[BatchPlan]:
        start, self.start = self.start, 0  # a resumed start holds for one epoch
        order = self._order()
        number = 0
        for begin in range(0, self.size, self.pairs_per_step):
            step = order[begin : begin + self.pairs_per_step]
            width = self.batch_size * self.num_replicas
            for first in range(0, len(step), width):
                if number >= start:
                    mine = step[first + self.rank * self.batch_size :][: self.batch_size]
                    if mine:
                        yield BatchPlan(tuple(mine), (1.0,) * len(mine), len(step))
                    else:
                        yield BatchPlan((step[0],), (0.0,), len(step))
                number += 1

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()
