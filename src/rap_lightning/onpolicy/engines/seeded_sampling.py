"""Sampling with random numbers of each sequence's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededSampling:
    """A logits processor that samples, and leaves the token it drew as the only one that can be picked.

    Each row has a generator of its own, so that what is drawn for a response depends on neither the batch it is in nor
    its place there, as far as the logits don't: they differ by rounding where padding does. One number is drawn per
    row and step, and looked up in the cumulative probabilities.

    Args:
        seeds: of the rows, [B].
        width: of the prompts with their padding, in tokens.
        steps: most tokens that are drawn.
        temperature: logits are divided by it; above 0.
        top_p: share of the probability that the likeliest tokens together must hold to be drawn from.
    """

    def __init__(self, seeds: Sequence[int], width: int, steps: int, temperature: float, top_p: float) -> None:
        self.width, self.temperature, self.top_p = width, temperature, top_p
        rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
        self.draws = torch.stack(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] logits, -inf but for the token that was drawn."""
        draws = self.draws[:, input_ids.shape[1] - self.width].to(scores.device)
        picked = draw(scores, draws, self.temperature, self.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, picked[:, None], 0.0)


def draw(scores: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """[B] int64: the token of each row at which the cumulative probability passes ``draws``, [B] float64 in [0, 1)."""
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    probs = torch.softmax(scores.float() / temperature, dim=-1).to(exact)
    order = None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs
        probs = probs * (before < top_p)  # the first token always stays
    total = probs.cumsum(-1)
    place = torch.searchsorted(total, (draws.to(exact) * total[:, -1])[:, None], right=True)
    place = place.clamp(max=scores.shape[-1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0]
