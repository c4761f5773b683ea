"""Attention over a forest with an explicit mask: right on every device and with every option, and the slowest.

Also what the other paths share: the call, and where a token is on its path.

Shape legend: H query heads, G key-value heads, T tokens, t tokens of one tree, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rap_lightning.batches.types import Forest
from rap_lightning.models.per_forest import once_per_forest, to_device


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


@once_per_forest
def positions(forest: Forest) -> Tensor:
    """Return how many tokens are before each on its path, [T] int64."""
    return to_device(torch.from_numpy(host_positions(forest)), forest.end.device)


def host_positions(forest: Forest) -> npt.NDArray[np.int64]:
    """Return how many tokens are before each on its path, [T]: made from the paths, so no device is waited for."""
    found = np.empty(forest.runs[-1][1], np.int64)
    for path in forest.paths:
        before = 0
        for start, stop in path:
            found[start:stop] = np.arange(before, before + stop - start)
            before += stop - start
    return found


def tree_mask(forest: Forest, start: int, stop: int, window: int | None) -> Tensor:
    """Return which query (row) sees which key (column) in the tree from ``start`` to ``stop``, [t, t] bool."""
    end = forest.end[start:stop]
    index = torch.arange(start, stop, device=end.device)
    sees: Tensor = (index <= index[:, None]) & (index[:, None] < end)
    if window is not None:
        position = positions(forest)[start:stop]
        sees &= position[:, None] < position + window  # a comparison makes no [t, t] of int64, as a difference would
    return sees


@once_per_forest
def tree_masks(forest: Forest, window: int | None) -> list[Tensor]:
    """Return the mask of each tree: t² bytes each, until the next forest."""
    return [tree_mask(forest, start, stop, window) for start, stop in forest.roots]


def cost(call: AttentionCall) -> str:
    """Return what the mask takes, for a warning."""
    longest = max(stop - start for start, stop in call.forest.roots)
    scores = call.query.shape[1] * longest**2 * call.query.dtype.itemsize
    return (
        f"{longest**2 / 2**20:,.0f} MiB for the largest tree of this batch, of {longest:,} tokens, and up to "
        f"{scores / 2**20:,.0f} MiB of scores in each layer; both grow with the square of the tokens"
    )


def attend(call: AttentionCall) -> Tensor:
    """Return [1, H, T, D], computed tree by tree."""
    outs = []
    for (start, stop), mask in zip(call.forest.roots, tree_masks(call.forest, call.window), strict=True):
        q, k, v = (x[:, :, start:stop] for x in (call.query, call.key, call.value))
        outs.append(_masked(q, k, v, mask, call))
    return torch.cat(outs, 2)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: AttentionCall) -> Tensor:
    """[1, H, t, D]: the textbook formula where torch's kernel has no such option, with softmax in float32."""
    plain = call.softcap is None and call.sinks is None
    # with `enable_gqa` and a mask, SDPA on CUDA has nothing but its slowest kernel, which makes all scores
    if not (plain and query.device.type == "cpu"):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if plain:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    scores = query @ key.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, call.dropout) @ value
