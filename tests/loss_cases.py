"""Inputs for any loss, made from what it declares that it needs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rap_lightning.losses as family
from rap_lightning.batches.types import PairLogps, PairRewards, TokenLogps
from rap_lightning.losses import DPO, SFT, PreferenceLoss


def concrete(base: type = PreferenceLoss) -> list[type[Any]]:
    """Every loss of the package that can be named in a config, found without a list."""
    found = [c for c in base.__subclasses__() if c.__module__.startswith(family.__name__)]
    return [c for c in found if not inspect.isabstract(c)] + [c for child in found for c in concrete(child)]


LOSSES = sorted(set(concrete()), key=lambda kind: kind.__name__)


def make(kind: type[Any]) -> Any:
    """An instance with its defaults; a required list of losses gets two."""
    required = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return kind(**{p.name: [DPO(), SFT()] for p in required}).eval()


def logps(
    chosen: Any, rejected: Any, lengths: tuple[Any, Any] = (7, 9), dtype: torch.dtype = torch.float64
) -> PairLogps:
    """Spread evenly over each response's tokens, so that losses of tokens can be called too."""
    chosen, rejected = (torch.as_tensor(x, dtype=dtype).reshape(-1) for x in (chosen, rejected))
    n_chosen, n_rejected = (torch.as_tensor(n).expand(len(chosen)) for n in lengths)
    counts = torch.stack((n_chosen, n_rejected), 1).flatten()
    means = torch.stack((chosen / n_chosen, rejected / n_rejected), 1).flatten()
    segment = torch.repeat_interleave(torch.arange(len(counts)), counts)
    tokens = TokenLogps.of(means[segment], segment, torch.full((len(segment),), -1.5, dtype=dtype))
    sums = torch.stack((chosen, rejected), 1).flatten()
    return PairLogps(chosen, rejected, n_chosen, n_rejected, tokens=tokens, unrelated=sums.roll(2).detach())


def random_logps(pairs: int, seed: int, lengths: tuple[Any, Any] | None = None) -> PairLogps:
    """Log-probabilities of tokens drawn one by one, in float64."""
    generator = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = tuple(torch.randint(2, 12, (pairs,), generator=generator) for _ in range(2))
    counts = torch.stack(lengths, 1).flatten()
    segment = torch.repeat_interleave(torch.arange(2 * pairs), counts)
    values = -3 * torch.rand(len(segment), generator=generator, dtype=torch.float64)
    collisions = -2 * torch.rand(len(segment), generator=generator, dtype=torch.float64)
    sums = torch.zeros(2 * pairs, dtype=torch.float64).index_add(0, segment, values)
    other = -20 * torch.rand(2 * pairs, generator=generator, dtype=torch.float64)
    return PairLogps.from_segments(
        sums, counts, tokens=TokenLogps.of(values, segment, collisions), unrelated=other
    )  # fmt: skip


def rewards_for(pairs: int, conditioned: bool | None = None) -> PairRewards:
    """Chosen 8, 7.5, 7, ..., rejected 3; conditioned, chosen's own reward is the goal."""
    chosen = 8 - torch.arange(pairs, dtype=torch.float64) % 9 / 2
    goals = None if conditioned is None else chosen if conditioned else torch.full_like(chosen, torch.nan)
    return PairRewards(chosen, torch.full((pairs,), 3.0).double(), goals)


def call(loss: Any, policy: PairLogps, reference: PairLogps, rewards: PairRewards | None = None) -> Tensor:
    """The loss of each pair."""
    value: Tensor = loss.per_pair(
        policy, reference if "reference" in loss.requires else None, rewards or rewards_for(len(policy.chosen))
    )
    return value


def taken(given: PairLogps, pairs: list[int]) -> PairLogps:
    """The same of some pairs only."""
    index = torch.tensor(pairs)
    both = torch.stack((2 * index, 2 * index + 1), 1).flatten()
    tokens = given.tokens
    assert tokens is not None
    assert given.unrelated is not None
    parts = [(tokens.segment == s).nonzero()[:, 0] for s in both]
    where = torch.cat(parts)
    segment = torch.cat([torch.full((len(part),), new) for new, part in enumerate(parts)])
    collisions = None if tokens.log_collisions is None else tokens.log_collisions[where]
    return replace(
        given,
        chosen=given.chosen[index], rejected=given.rejected[index],
        chosen_lengths=given.chosen_lengths[index], rejected_lengths=given.rejected_lengths[index],
        weights=None if given.weights is None else given.weights[index],
        tokens=TokenLogps.of(tokens.logps[where], segment, collisions), unrelated=given.unrelated[both],
    )  # fmt: skip
