"""Attention over a forest of sequences, for any transformers model that asks ``AttentionInterface`` for its kernel.

The rule stands in :class:`rap_lightning.batches.types.Forest`: a query sees the keys on its path from the root. Which
road a call takes depends on what the layer asks for:

- on a CPU, plain attention: a kernel call per run of tokens for what the run sees of itself, and one for what all its
  descendants see of it, merged by their log-sum-exp. Nothing is computed twice and nothing is masked away.
- on a GPU, FlexAttention, sliding windows and soft-capping included, once it has proved itself there (``flex``).
- anything else (on a CPU, sliding windows shorter than a sequence and logit soft-capping; attention sinks and dropout
  anywhere): a mask per tree. Right everywhere.

No GPU has been at hand: on one, neither road's speed was ever measured.

Shape legend: H query heads, G key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rap_lightning.batches.types import Forest
from rap_lightning.models import flex_attention as flex

NAME = "rap_forest"
WINDOWS = ("sliding_window", "attention_chunk_size")

Made: TypeAlias = dict[int | None, tuple[Forest, Any]]
"""Block masks by window, with the forest they are of."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forest_attention(config: Any, windows: set[int] | None = None) -> AbstractContextManager[None]:
    """Attention by forest, for the length of a block, in the model that was built from ``config``.

    The sliding windows that layers ask for are added to ``windows``. transformers makes no mask for an implementation
    it has no mask function for, which is what is wanted here.
    """
    from transformers import AttentionInterface

    # kernels are called run by run, which a compiler of layers must not unroll for every forest anew
    AttentionInterface.register(NAME, torch.compiler.disable(partial(_forward, windows=windows, made={})))
    return _implementation(config, NAME)


def declared_windows(config: Any) -> set[int]:
    """Windows or chunks, in tokens, within which layers of the model say they attend."""
    if getattr(config, "use_sliding_window", True) is False:
        return set()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) == {"full_attention"}:
        return set()
    return {size for name in WINDOWS if (size := getattr(config, name, None))}


def attention_as_now(config: Any) -> AbstractContextManager[None]:
    """A block, entered later, with the attention implementation of now."""
    return _implementation(config, config._attn_implementation)


@contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    forest: Forest, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, windows: set[int] | None = None,
    made: Made | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if windows is not None and sliding_window is not None:
        windows.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < forest.longest else None
    plain = not dropout and window is None and softcap is None and s_aux is None
    if plain and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        # the kernel knows no autocast; a model that rotates in float32 hands over mixed dtypes
        q, k, v = (x[0].to(value.dtype) for x in (query, key, value))
        out = _RunByRun.apply(q, k, v, forest.runs, scale)
        return out.transpose(0, 1)[None], None
    if query.is_cuda and not dropout and s_aux is None and _flex_works(query, key, value):
        out = flex.attend(query, key, value, _blocks(forest, window, made), scale, softcap)
        return out.transpose(1, 2), None
    outs = []
    for start, stop in forest.roots:
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        mask = _mask(forest, start, stop, window)
        outs.append(_masked(q, k, v, mask, scale, dropout if module.training else 0.0, softcap, s_aux))
    return torch.cat(outs, 2).transpose(1, 2), None


class _RunByRun(torch.autograd.Function):
    """Softmax attention over parts of the keys, merged exactly, as in ring attention.

    Each part's kernel gives its output and log-sum-exp; the weighted mean of the outputs is attention over all of them.
    The backward kernel of each part, given the *merged* output and log-sum-exp, gives the part's share of the exact
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: tuple[tuple[int, int, int], ...], scale: float
    ) -> Tensor:
        # heads that share a key head form the kernel's second dimension, the keys repeated along it without a copy
        query, key, value = _grouped(query, key, value)
        heads, group, tokens, size = query.shape
        # [T, H, D] in memory: what the output projection reads
        out: Tensor = query.new_empty(tokens, heads * group, size).unflatten(1, (heads, group)).permute(1, 2, 0, 3)
        wide = torch.promote_types(query.dtype, torch.float32)
        log_z = torch.empty(tokens, heads, group, dtype=wide, device=query.device).permute(1, 2, 0)
        for rows, keys, causal in _parts(runs):
            q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            part, part_log_z = _flash(q, k, v, 0.0, causal, scale=scale)
            if causal:  # a token sees itself before it sees its ancestors
                out[:, :, rows], log_z[:, :, rows] = part, part_log_z
            else:
                both = torch.logaddexp(log_z[:, :, rows], part_log_z)
                share = (part_log_z - both).exp_()[..., None].to(out.dtype)
                out[:, :, rows].lerp_(part, share)
                log_z[:, :, rows] = both
        ctx.save_for_backward(query, key, value, out, log_z)
        ctx.runs, ctx.scale = runs, scale
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_z = ctx.saved_tensors
        heads, group = query.shape[:2]
        grad = grad.unflatten(0, (heads, group))
        grad_query, (grad_key, grad_value) = torch.empty_like(query), (torch.empty_like(key[:, 0]) for _ in range(2))
        for rows, keys, causal in _parts(ctx.runs):
            q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            g_q, g_k, g_v = _flash_backward(
                grad[:, :, rows], q, k, v, out[:, :, rows], log_z[:, :, rows], 0.0, causal, scale=ctx.scale
            )
            if causal:  # each token's first part: runs cover all tokens
                grad_query[:, :, rows], grad_key[:, keys], grad_value[:, keys] = g_q, g_k.sum(1), g_v.sum(1)
            else:
                grad_query[:, :, rows] += g_q
                grad_key[:, keys] += g_k.sum(1)
                grad_value[:, keys] += g_v.sum(1)
        return grad_query.flatten(0, 1), grad_key, grad_value, None, None


def _parts(runs: tuple[tuple[int, int, int], ...]) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, causal): what each run sees of itself first, then what descendants see of a run."""
    for start, stop, _ in runs:
        yield slice(start, stop), slice(start, stop), True
    for start, stop, end in runs:
        if stop < end:
            yield slice(stop, end), slice(start, stop), False


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = key.shape[0]
    query = query.unflatten(0, (heads, -1))
    return query, *(x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))  # type: ignore[return-value]


def _flex_works(query: Tensor, key: Tensor, value: Tensor) -> bool:
    same = query.shape[-1] == value.shape[-1] and query.dtype == key.dtype == value.dtype
    return same and flex.works(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], _by_mask)


def _by_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    return _masked(query, key, value, mask, scale, 0.0, softcap, None)


def _blocks(forest: Forest, window: int | None, made: Made | None) -> Any:
    """The block mask of a forest, made once for all layers of a forward pass."""
    made = {} if made is None else made
    if window not in made or made[window][0] is not forest:  # a checkpointed layer may come back to an earlier forest
        made[window] = (forest, flex.block_mask(forest, _positions(forest), window))
    return made[window][1]


def _positions(forest: Forest) -> Tensor:
    """[T] int64: how many tokens stand before each on its path."""
    positions = torch.empty_like(forest.end)
    for path in forest.paths:
        places = torch.cat([torch.arange(*span, device=positions.device) for span in path])
        positions[places] = torch.arange(len(places), device=positions.device)
    return positions


def _mask(forest: Forest, start: int, stop: int, window: int | None) -> Tensor:
    """[t, t] bool of one tree: what sees what by the forest's rule, within ``window`` positions."""
    end = forest.end[start:stop]
    index = torch.arange(start, stop, device=end.device)
    sees: Tensor = (index <= index[:, None]) & (index[:, None] < end)
    if window is not None:
        position = sees.sum(1)  # a token sees its ancestors and itself
        sees &= position[:, None] - position < window
    return sees


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """[1, H, t, D]: the textbook formula where a kernel has no option for what is asked, softmax in float32."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=True
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:  # a logit per head that takes probability and gives no value (gpt-oss)
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ value
