"""Which pairs are in which batch.

Batches are planned per optimizer step, so that an epoch is complete, deterministic, and the mean over a step is a mean
over its pairs, however they are spread over ranks and accumulated batches, and however many the last step has.

Which pairs are in a step is random and depends only on the seed and the epoch. Within a step their order does not
matter, so they are sorted by length, dealt to the ranks in turn, and packed into forward passes.

:class:`StepSampler` yields a :class:`BatchPlan` for each batch of its rank; :class:`Packing` splits a batch into
forward passes within a token budget.
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
    """Tokens of a training pair's prompt and responses, end of turn included."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one rank.

    Attributes:
        indices: the numbers of its pairs.
        weights: of each pair, 0 for a filler.
        step_pairs: pairs in the whole optimizer step.
        parts: positions in ``indices`` of the pairs of each forward and backward pass.
        loss_weights: weight of each pair's loss in the mean over the step; by default ``weights``.
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
        indices = tuple(self.indices[i] for i in places)
        weights, loss_weights = (tuple(values[i] for i in places) for values in (self.weights, self.loss_weights))
        parts = (tuple(range(len(places))),)
        return BatchPlan(indices, weights, self.step_pairs, parts, loss_weights, self.step_weight)


@dataclass(frozen=True)
class Packing:
    """Splits batches into forward passes of at most ``budget`` tokens.

    Raises:
        ConfigError: a single pair exceeds the budget.
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
        return self.tokens([self.sizes[index]])

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """Split pairs, the longest first, into forward passes within the budget, by first fit."""
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
    """Plans the batches of one rank.

    It is a ``DistributedSampler``, so that Lightning leaves it in place and sets its epoch.

    Args:
        size: number of training pairs.
        batch_size: pairs per rank and batch.
        accumulate: batches per optimizer step.
        num_replicas, rank: of this process.
        shuffle: use a new order in each epoch, determined by ``seed`` and the epoch.
        seed: of the order.
        packing: splits a batch into forward passes; by default a batch is one.
        weigh: weight of a training pair's loss, by its number, in the mean over its step; by default all are equal.

    A rank that has no pair left in the last step gets one filler of weight 0: every rank runs the same number of
    batches, and of forward passes in each, or collectives of sharding strategies would wait forever.
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
        return self.batch_size * self.accumulate * self.num_replicas

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.pairs_per_step)
        return full * self.accumulate + math.ceil(rest / (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[BatchPlan]:
        start, self.start = self.start, 0  # a resumed start is for one epoch only
        order = self._order()
        number = 0
        for begin in range(0, self.size, self.pairs_per_step):
            step = order[begin : begin + self.pairs_per_step]
            if self.packing is not None:
                step.sort(key=self.packing.alone, reverse=True)  # stable: pairs of equal length stay in random order
            width = self.batch_size * self.num_replicas
            for first in range(0, len(step), width):
                if number >= start:
                    yield self._plan(step[first : first + width], step)
                number += 1

    def _plan(self, pairs: list[int], step: list[int]) -> BatchPlan:
        """This rank's share of the pairs that all ranks process at once; ``step`` holds all pairs of the step."""
        shares = self._shares(pairs)
        packed = [[share] if self.packing is None else self.packing.parts(share) for share in shares]
        most = max(map(len, packed))
        mine = packed[self.rank]
        while len(mine) < most:  # the same number of passes on every rank: each has collectives
            fullest = max(mine, key=len, default=[])
            mine.append([fullest.pop()] if len(fullest) > 1 else [])
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
        # in turn, forwards and backwards: pairs of similar length go to different ranks, and no rank is always first
        turns = [*range(self.num_replicas), *reversed(range(self.num_replicas))]
        shares: list[list[int]] = [[] for _ in range(self.num_replicas)]
        for place, index in enumerate(pairs):
            shares[turns[place % len(turns)]].append(index)
        return shares

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.size, generator=generator, device="cpu").tolist()
