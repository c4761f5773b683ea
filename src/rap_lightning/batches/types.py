"""The records that data, models and losses exchange.

Shape legend:
    B  pairs in a batch                 R  rows of the model's input
    M  response tokens of the batch     T  tokens in a row
Response s of the 2B responses belongs to pair s // 2; even s is chosen, odd s is rejected: see ``split_segments``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

RESPONSES = 2
"""Responses in a pair; segment ``RESPONSES * i + j`` is response j of pair i."""

T = TypeVar("T", Tensor, Sequence[float])


def split_segments(values: T) -> tuple[T, T]:
    """(chosen, rejected), [B] each, of [2B] values in segment order."""
    return values[0::RESPONSES], values[1::RESPONSES]


def copies_at_once(device: torch.device) -> bool:
    """Return whether the host need not wait for its copies to the device (CUDA and its like).

    On MPS such a copy may read memory that has changed since (https://github.com/pytorch/pytorch/issues/83015).
    """
    return device.type not in ("cpu", "mps")


class _Movable:
    """Applies a function to every tensor of a dataclass.

    Lightning calls ``to`` on batches that have it, and torch's DataLoader ``pin_memory``.
    """

    def to(self, device: torch.device | str) -> Self:
        """Copy to the device; the host waits only for a copy that comes back to it."""
        target = torch.device(device)
        return self.map(lambda tensor: tensor.to(target, non_blocking=copies_at_once(target)))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which a GPU copies while the host continues."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, Tensor | _Movable):
                values[name] = function(value) if isinstance(value, Tensor) else value.map(function)
        return type(self)(**values)


@dataclass(frozen=True)
class Forest(_Movable):
    """Sequences that share prefixes, laid out depth first in one row of T tokens.

    Query q attends to key k exactly when ``k <= q < end[k]``: this rule alone gives causality, packing (separate roots)
    and prefix sharing (siblings), for trees of any depth. Positions count along the path from the root.

    Attributes:
        end: [T] int64, the index just past the subtree of the node that the token belongs to.
        runs: (start, stop, end) of each run of tokens with the same ``end``, in order, as plain numbers: on a CPU,
            kernels are called once for each.
        paths: for each root-to-leaf path, the (start, stop) spans of the tokens on it, in order.
    """

    end: Tensor
    runs: tuple[tuple[int, int, int], ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def roots(self) -> list[tuple[int, int]]:
        """(start, stop) of each tree."""
        found: list[tuple[int, int]] = []
        for start, _, end in self.runs:
            if not found or start >= found[-1][1]:
                found.append((start, end))
        return found

    @property
    def longest(self) -> int:
        return max(sum(stop - start for start, stop in path) for path in self.paths)


@dataclass(frozen=True)
class Batch(_Movable):
    """Pairs of responses, whatever the layout.

    Fields of responses are in segment order, [2B]: see ``split_segments``. Another number of each response that the
    model or the loss needs is one more such field, filled by rap_lightning.batches.layouts.lay_out.

    Attributes:
        input_ids: [R, T] int64.
        position_ids: [R, T] int64, counted along each sequence.
        attention_mask: [R, T] int64, 1 for tokens and 0 for padding, which is on the right.
        forest: which token attends to which in a single row of many sequences; ``None`` where each row is one sequence.
        predict_from: [M] int64, index into the flattened [R * T] hidden states: the one that predicts the token.
        target: [M] int64, the token's id.
        segment: [M] int64, which of the 2B responses the token belongs to.
        lengths: [2B] int64, response tokens including the end of turn.
        rewards: [B, 2] float32, the judge's rewards of chosen and rejected, in the scale's units.
        goal_rewards: [B] float32, the reward that the prompt asks for, in the same units; nan where it asks for none.
        origin: [B] int64, index into :data:`rap_lightning.preferences.relabelling.ORIGINS`.
        weights: [B] float32, 1 for a pair and 0 for one that only fills a rank's last batch.
        fillers: how many pairs have weight 0; known on the host, so that a step need not ask the device.
        step_pairs: pairs of weight 1 in the whole optimizer step, over all ranks and accumulated batches.
        loss_weights: [B] float32, weight of a pair's loss in the mean over the step: ``weights``, unless the data
            module weighs pairs by origin or the data by a column. Logged means do not use them.
        step_weight: the sum of ``loss_weights`` over the whole optimizer step.
        digests: of the token ids of each of the 2B responses with its prompt; the keys of stored log-probabilities.
        pair_ids: the pairs' ids, for messages.
        goals: the printed goals, for messages.
        unrelated: each prompt with another pair's responses, for losses that require "unrelated"
            (rap_lightning.batches.unrelated); the module adds it before the batch is copied to the device.
        strength: [R, T] float32, factor on the policy's adapter at each token, the same over a sequence; None leaves
            the adapter as it is.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    forest: Forest | None
    predict_from: Tensor
    target: Tensor
    segment: Tensor
    lengths: Tensor
    rewards: Tensor
    goal_rewards: Tensor
    origin: Tensor
    weights: Tensor
    fillers: int
    step_pairs: int
    loss_weights: Tensor
    step_weight: float
    digests: tuple[bytes, ...]
    pair_ids: tuple[str, ...]
    goals: tuple[str | None, ...]
    unrelated: Batch | None = None
    strength: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def tokens(self) -> Tensor:
        """Tokens that are not padding, [] int64."""
        return self.attention_mask.sum()


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities of single response tokens, flat over the batch.

    Attributes:
        logps: [M] float32, its log-probability, in nats.
        segment: [M] int64, which of the 2B responses it belongs to.
        position: [M] int64, counted from 0 in its response.
        log_collisions: [M] float32 or None, log Σ_v p(v)² of the model's distribution at the token, without gradient.
    """

    logps: Tensor
    segment: Tensor
    position: Tensor
    log_collisions: Tensor | None = None

    @classmethod
    def of(cls, logps: Tensor, segment: Tensor, log_collisions: Tensor | None = None) -> TokenLogps:
        """From a batch's flat order, in which the tokens of a response are consecutive."""
        index = torch.arange(len(segment), device=segment.device)
        begins = torch.ones_like(segment, dtype=torch.bool)
        begins[1:] = segment[1:] != segment[:-1]
        first = torch.where(begins, index, 0).cummax(0).values  # of the token's response, without asking for its number
        return cls(logps, segment, index - first, log_collisions)


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both responses of each pair.

    Attributes:
        chosen, rejected: [B] float32, summed over the response's tokens, in nats.
        chosen_lengths, rejected_lengths: [B] int64, response tokens including the end of turn.
        weights: [B] float32, 1 for a pair and 0 for one that only fills a rank's last batch; None: all 1.
        tokens: for losses that require "tokens".
        unrelated: [2B] float32, for losses that require "unrelated": summed log-probability, in segment order, of
            another pair's responses to this pair's prompt (rap_lightning.batches.unrelated says which).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    weights: Tensor | None = None
    tokens: TokenLogps | None = None
    unrelated: Tensor | None = None

    @classmethod
    def from_segments(cls, logps: Tensor, lengths: Tensor, **more: Any) -> PairLogps:
        return cls(*split_segments(logps), *split_segments(lengths), **more)


@dataclass(frozen=True)
class PairRewards:
    """Rewards of both responses.

    Attributes:
        chosen, rejected: [B] float32, the judge's, in the scale's units.
        goals: [B] float32, the reward that the prompt asks for, in the same units, nan where it states no goal; None:
            no prompt states one. Under its own goal it is chosen's reward, under the best goal the scale's best, and
            under a drawn goal what that one asks for.
    """

    chosen: Tensor
    rejected: Tensor
    goals: Tensor | None = None

    def under_goal(self, power: int = 1) -> PairRewards:
        """Rewards under the prompt's goal g: -|g - r|^power, or the judge's own where the prompt states no goal.

        The paper uses power 2 (https://arxiv.org/abs/2410.08067, section 4).
        """
        if self.goals is None:
            return self
        chosen, rejected = (
            torch.where(self.goals.isnan(), own, -((self.goals - own).abs() ** power))
            for own in (self.chosen, self.rejected)
        )
        return PairRewards(chosen, rejected, self.goals)


@dataclass(frozen=True)
class PromptBatch(_Movable):
    """Prompts to generate from, padded on the left.

    Attributes:
        input_ids, attention_mask: [R, T] int64.
        records: what ``predict`` writes beside each sample: the conversation and the goal.
        against: the same conversations at the low goal of guidance; None without guidance.
        strength: [R, 1] float32, factor on the policy's adapter; None leaves the adapter as it is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    records: tuple[dict[str, Any], ...]
    against: PromptBatch | None = None
    strength: Tensor | None = None
