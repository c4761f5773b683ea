"""Attention over a forest with an explicit mask: right on every device and with every option, and the slowest.

Also what the other paths share: the call, and where a token is on its path.

Shape legend: H query heads, G key-value heads, T tokens, t tokens of one tree, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import Forest


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a layer asks for.

    Attributes:
        query: [1, H, T, D].
        key, value: [1, G, T, D].
        forest: which query sees which key.
        scale: factor on the scores.
        window: positions on its path that a query sees, itself included; None where all are seen.
        softcap: c in c · tanh(scores / c) (Gemma 2), or None.
        sinks: [H] a logit per head that takes probability and has no value (gpt-oss), or None.
        dropout: probability, on the weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    forest: Forest
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


def positions(forest: Forest) -> Tensor:
    """Return how many tokens are before each on its path, [T] int64.

    Of the tokens before k in depth-first order, those whose subtree has ended by k are not on k's path.
    """
    tokens = len(forest.end)
    ended = torch.bincount(forest.end, minlength=tokens + 1)[:tokens].cumsum(0)
    return torch.arange(tokens, device=forest.end.device) - ended


def tree_mask(forest: Forest, start: int, stop: int, window: int | None) -> Tensor:
    """Return which query (row) sees which key (column) in the tree from ``start`` to ``stop``, [t, t] bool."""
    end = forest.end[start:stop]
    index = torch.arange(start, stop, device=end.device)
    sees: Tensor = (index <= index[:, None]) & (index[:, None] < end)
    if window is not None:
        position = positions(forest)[start:stop]
        sees &= position[:, None] - position < window
    return sees


def attend(call: AttentionCall) -> Tensor:
    """Return [1, H, T, D], computed tree by tree."""
    outs = []
    for start, stop in call.forest.roots:
        q, k, v = (x[:, :, start:stop] for x in (call.query, call.key, call.value))
        outs.append(_masked(q, k, v, tree_mask(call.forest, start, stop, call.window), call))
    return torch.cat(outs, 2)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: AttentionCall) -> Tensor:
    """[1, H, t, D]: the textbook formula where torch's kernel has no such option, with softmax in float32."""
    if call.softcap is None and call.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scale, enable_gqa=True
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, call.dropout) @ value
