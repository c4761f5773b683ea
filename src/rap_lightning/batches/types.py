"""What travels between floors.

Shape legend:
    B  pairs in a batch                 R  rows of the model's input
    M  response tokens of the batch     T  tokens in a row
Response s of the 2B responses belongs to pair s // 2; even s is chosen, odd s is rejected.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


class _Movable:
    """Moves every tensor of a dataclass; Lightning calls ``to`` on batches that have it."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy with every tensor moved."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """A copy with every tensor in pinned memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Self:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: _moved(value, function) for name, value in values.items()})


def _moved(value: Any, function: Any) -> Any:
    if isinstance(value, _Movable):
        return value._map(function)
    return function(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Forest(_Movable):
    """Sequences that share prefixes, laid out depth first in one row of T tokens.

    Query q may see key k exactly when ``k <= q < end[k]``: that one rule is causality, packing (separate roots) and
    prefix sharing (siblings), for trees of any depth. Positions count along the path from the root.

    Attributes:
        end: [T] int64, the index just past the subtree of the node that the token belongs to.
        runs: (start, stop, end) of each run of tokens with the same ``end``, in order, as plain numbers: kernels on a
            CPU are called run by run.
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
        """Tokens on the longest path."""
        return max(sum(stop - start for start, stop in path) for path in self.paths)


@dataclass(frozen=True)
class Batch(_Movable):
    """Pairs of responses, whatever the layout.

    Attributes:
        input_ids: [R, T] int64.
        position_ids: [R, T] int64, counted along each sequence.
        attention_mask: [R, T] int64, 1 for tokens and 0 for padding, which stands on the right.
        forest: what sees what in a single row of many sequences; ``None`` where each row is a sequence of its own.
        predict_from: [M] int64, index into the flattened [R * T] hidden states: the one that predicts the token.
        target: [M] int64, the token's id.
        segment: [M] int64, which of the 2B responses the token belongs to.
        lengths: [2B] int64, response tokens including the end of turn.
        rewards: [B, 2] float32, the judge's rewards of chosen and rejected, in the scale's units.
        origin: [B] int64, index into :data:`rap_lightning.preferences.relabelling.ORIGINS`.
        weights: [B] float32, 1 for a pair and 0 for one that only fills a rank's last batch.
        step_pairs: pairs of weight 1 in the whole optimizer step, over all ranks and accumulated batches.
        loss_weights: [B] float32, what a pair's loss counts in the mean over the step: ``weights``, but where the data
            module weighs a half of the pairs differently. Logged means don't know them.
        step_weight: the sum of ``loss_weights`` over the whole optimizer step.
        digests: of each of the 2B responses with its prompt, over their token ids; what stored log-probabilities are
            found by.
        pair_ids: the pairs' ids, for messages.
        goals: the printed goals, for messages.
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
    origin: Tensor
    weights: Tensor
    step_pairs: int
    loss_weights: Tensor
    step_weight: float
    digests: tuple[bytes, ...]
    pair_ids: tuple[str, ...]
    goals: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def tokens(self) -> Tensor:
        """Tokens that are not padding, [] int64."""
        return self.attention_mask.sum()


@dataclass(frozen=True)
class TokenLogps:
    """What is known of each response token, flat over the batch.

    Attributes:
        logps: [M] float32, its log-probability, in nats.
        segment: [M] int64, which of the 2B responses it belongs to.
        position: [M] int64, counted from 0 in its response.
        log_collisions: [M] float32 or None, log Σ_v p(v)² of the distribution it was drawn from, without gradient.
    """

    logps: Tensor
    segment: Tensor
    position: Tensor
    log_collisions: Tensor | None = None

    @classmethod
    def of(cls, logps: Tensor, segment: Tensor, log_collisions: Tensor | None = None) -> TokenLogps:
        """From a batch's flat order, in which the tokens of a response follow each other."""
        index = torch.arange(len(segment), device=segment.device)
        responses = int(segment.max()) + 1 if len(segment) else 0
        first = index.new_full((responses,), len(index)).scatter_reduce(0, segment, index, "amin")
        return cls(logps, segment, index - first[segment], log_collisions)


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both responses of each pair.

    Attributes:
        chosen, rejected: [B] float32, summed over the response's tokens, in nats.
        chosen_lengths, rejected_lengths: [B] int64, response tokens including the end of turn.
        weights: [B] float32, 1 for a pair and 0 for one that only fills a rank's last batch; None: all 1.
        tokens: for losses that require "tokens".
        unrelated: [2B] float32, for losses that require "unrelated": summed log-probability of the response of the
            nearest pair before this one (the last comes before the first) that was made of another scored pair, to this
            pair's prompt, chosen at 2i and rejected at 2i+1.
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
        """From [2B] values in segment order."""
        return cls(logps[0::2], logps[1::2], lengths[0::2], lengths[1::2], **more)


@dataclass(frozen=True)
class PairRewards:
    """Rewards of both responses.

    Attributes:
        chosen, rejected: [B] float32, the judge's, in the scale's units.
        conditioned: [B] bool, whether the prompt states a goal, which is then the reward of chosen; None: nowhere.
    """

    chosen: Tensor
    rejected: Tensor
    conditioned: Tensor | None = None

    def under_goal(self, power: int = 1) -> PairRewards:
        """Rewards by which chosen was chosen: -|g - r|^power where the prompt states a goal g, else the judge's own.

        The paper's is power 2 (https://arxiv.org/abs/2410.08067, section 4). Chosen has the goal's reward, so 0.
        """
        if self.conditioned is None:
            return self
        missed = -((self.chosen - self.rejected).abs() ** power)
        chosen = torch.where(self.conditioned, torch.zeros_like(missed), self.chosen)
        return PairRewards(chosen, torch.where(self.conditioned, missed, self.rejected), self.conditioned)


@dataclass(frozen=True)
class PromptBatch(_Movable):
    """Prompts to generate from, padded on the left.

    Attributes:
        input_ids, attention_mask: [R, T] int64.
        records: what is written beside each sample: the conversation and the goal.
        against: the same conversations at the low goal that guidance pushes away from; None without guidance.
    """

    input_ids: Tensor
    attention_mask: Tensor
    records: tuple[dict[str, Any], ...]
    against: PromptBatch | None = None
