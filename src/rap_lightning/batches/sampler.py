"""Which pairs stand in which batch.

Batches are planned per optimizer step, so that an epoch is complete, deterministic, and the mean over a step is a mean
over its pairs, however they are spread over ranks and accumulated batches, and however many the last step has.

Which pairs a step has is random and depends on nothing but the seed and the epoch; within a step, pairs are free to
change places. So there they are sorted by length, dealt to the ranks by turns, and packed into forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DistributedSampler

from rap_lightning.errors import ConfigError


class PairSize(NamedTuple):
    """Tokens of a training pair's prompt and responses."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one rank.

    Attributes:
        indices: its pairs.
        weights: theirs, 0 for a filler.
        step_pairs: pairs in the whole optimizer step.
        parts: places in ``indices`` that go through the model together: one forward and backward pass each.
        loss_weights: what each pair's loss counts in the mean over the step; by default ``weights``.
        step_weight: their sum over the whole optimizer step; by default ``step_pairs``.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    step_pairs: int
    parts: tuple[tuple[int, ...], ...]
    loss_weights: tuple[float, ...] = ()
    step_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.step_weight:
            object.__setattr__(self, "loss_weights", self.weights)
            object.__setattr__(self, "step_weight", float(self.step_pairs))

    def part(self, places: tuple[int, ...]) -> BatchPlan:
        """The plan of one of the parts."""
        indices = tuple(self.indices[i] for i in places)
        weights, loss_weights = (tuple(values[i] for i in places) for values in (self.weights, self.loss_weights))
        parts = (tuple(range(len(places))),)
        return BatchPlan(indices, weights, self.step_pairs, parts, loss_weights, self.step_weight)


@dataclass(frozen=True)
class Packing:
    """How pairs share forward passes.

    Args:
        sizes: of every training pair.
        tokens: how many tokens a forward pass over these pairs has, at most.
        budget: tokens in a forward pass.

    Raises:
        ConfigError: a pair alone is over the budget.
    """

    sizes: Sequence[PairSize]
    tokens: Callable[[Sequence[PairSize]], int]
    budget: int

    def __post_init__(self) -> None:
        longest = max(range(len(self.sizes)), key=lambda i: self.alone(i))
        if self.alone(longest) > self.budget:
            raise ConfigError(
                f"--data.token_budget {self.budget:,} is too small: the longest pair alone takes "
                f"{self.alone(longest):,} tokens. Set at least that, or a shorter --data.max_length."
            )

    def alone(self, index: int) -> int:
        """Tokens of a forward pass over one pair."""
        return self.tokens([self.sizes[index]])

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """Pairs, the longest first, into forward passes within the budget: each goes to the first with room (FFD)."""
        parts: list[list[int]] = []
        for index in indices:
            for part in parts:
                if self.tokens([self.sizes[i] for i in (*part, index)]) <= self.budget:
                    part.append(index)
                    break
            else:
                parts.append([index])
        return parts


class StepSampler(DistributedSampler[BatchPlan]):
    """Yields :class:`BatchPlan`; a ``DistributedSampler``, so that Lightning leaves it in place and sets its epoch.

    Args:
        size: training pairs in all.
        batch_size: pairs per rank and batch.
        accumulate: batches per optimizer step.
        num_replicas, rank: of this process.
        shuffle: another order each epoch, from ``seed`` and the epoch alone.
        seed: of the order.
        packing: how the pairs of a batch share forward passes; by default all go through the model together.
        weigh: what the loss of a training pair, by its number, counts in the mean over its step; by default all count
            alike.

    A rank that has no pair left in the last step gets one filler of weight 0: every rank runs as many batches, and as
    many forward passes in each.
    """

    def __init__(
        self, size: int, batch_size: int, *, accumulate: int = 1, num_replicas: int = 1, rank: int = 0,
        shuffle: bool = False, seed: int = 0, packing: Packing | None = None,
        weigh: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.batch_size, self.accumulate, self.packing = size, batch_size, accumulate, packing
        self.weigh = weigh
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
            if self.packing is not None:
                step.sort(key=self.packing.alone, reverse=True)  # stable: pairs of one length stay in random order
            width = self.batch_size * self.num_replicas
            for first in range(0, len(step), width):
                if number >= start:
                    yield self._plan(step[first : first + width], step)
                number += 1

    def _plan(self, pairs: list[int], step: list[int]) -> BatchPlan:
        """This rank's share of the pairs that all ranks take at once, out of those of the step."""
        shares = self._shares(pairs)
        packed = [[share] if self.packing is None else self.packing.parts(share) for share in shares]
        most = max(map(len, packed))
        mine = packed[self.rank]
        while len(mine) < most:  # as many passes on every rank: sharding strategies meet in each
            fullest = max(mine, key=len, default=[])
            if len(fullest) > 1:
                mine.append([fullest.pop()])
            else:
                mine.append([])
        fillers = [part or [pairs[0]] for part in mine]
        weights = [1.0 if part else 0.0 for part in mine for _ in (part or [0])]
        places = iter(range(len(weights)))
        indices = tuple(index for part in fillers for index in part)
        parts = tuple(tuple(next(places) for _ in part) for part in fillers)
        if self.weigh is None:
            return BatchPlan(indices, tuple(weights), len(step), parts)
        loss_weights = tuple(w * self.weigh(index) for index, w in zip(indices, weights, strict=True))
        step_weight = math.fsum(map(self.weigh, step))
        return BatchPlan(indices, tuple(weights), len(step), parts, loss_weights, step_weight)

    def _shares(self, pairs: list[int]) -> list[list[int]]:
        if self.packing is None:
            return [pairs[r * self.batch_size :][: self.batch_size] for r in range(self.num_replicas)]
        # by turns, there and back: neighbours in length go to different ranks, and no rank is always first
        turns = [*range(self.num_replicas), *reversed(range(self.num_replicas))]
        shares: list[list[int]] = [[] for _ in range(self.num_replicas)]
        for place, index in enumerate(pairs):
            shares[turns[place % len(turns)]].append(index)
        return shares

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()
