"""Sampling with a random generator per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededSampling:
    """A logits processor that samples, and leaves the drawn token as the only candidate for greedy decoding.

    Each row has its own generator, so that the draws of a response depend on neither its batch nor its row in it
    (logits still differ by rounding with the padding). One uniform number per row and step selects the token from the
    cumulative probabilities.

    Args:
        seeds: seed of each row, [B].
        width: padded prompt length in tokens.
        steps: maximum number of tokens to draw.
        temperature: divisor of the logits, above 0.
        top_p: nucleus sampling: draw from the most likely tokens that together hold this probability.
    """

    def __init__(self, seeds: Sequence[int], width: int, steps: int, temperature: float, top_p: float) -> None:
        self.width, self.temperature, self.top_p = width, temperature, top_p
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.rand(steps, generator=one, dtype=torch.float64, device="cpu") for one in generators]
        self.draws = torch.stack(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return [B, V] logits, -inf except for the drawn token."""
        draws = self.draws[:, input_ids.shape[1] - self.width].to(scores.device)
        picked = draw(scores, draws, self.temperature, self.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, picked[:, None], 0.0)


def draw(scores: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return [B] int64: the first token of each row whose cumulative probability exceeds ``draws`` ([B] in [0, 1))."""
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    probs = torch.softmax(scores.float() / temperature, dim=-1).to(exact)
    order = None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs
        probs = probs * (before < top_p)  # always keeps the first token
    total = probs.cumsum(-1)
    place = torch.searchsorted(total, (draws.to(exact) * total[:, -1])[:, None], right=True)
    place = place.clamp(max=scores.shape[-1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0]
