"""Attention over a forest on CPUs: a kernel call per run of tokens, nothing computed twice and nothing masked away.

Shape legend: H query heads, G key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.private_api import cpu_flash_attention, cpu_flash_attention_backward

Runs: TypeAlias = tuple[tuple[int, int, int], ...]


def attend(call: AttentionCall) -> Tensor:
    """Return [1, H, T, D] of a call without soft cap, window, sinks and dropout."""
    out: Tensor = _BlockwiseAttention.apply(call.query[0], call.key[0], call.value[0], call.forest.runs, call.scale)
    return out[None]


class _BlockwiseAttention(torch.autograd.Function):
    """Softmax attention over parts of the keys, merged exactly, as in ring attention.

    A run is a stretch of tokens without a branch. Its queries attend causally to the run itself; then all of its
    descendants attend to it in one call. Each call gives its output and log-sum-exp, and the mean of a query's outputs,
    weighted by their exponentiated log-sum-exps, is attention over all its keys.

    In the backward pass the kernel of each part, given the *merged* output and log-sum-exp, gives that part's share of
    the exact gradient: softmax's gradient depends on the other parts through these two alone.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> Tensor:
        """[H, T, D] of query [H, T, D], key and value [G, T, D]."""
        # heads that share a key head form the kernel's second dimension; the keys repeat along it without a copy
        query = query.unflatten(0, (key.shape[0], -1))
        key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
        heads, group, tokens, size = query.shape
        # [T, H, D] in memory: what the output projection reads
        out: Tensor = query.new_empty(tokens, heads * group, size).unflatten(1, (heads, group)).permute(1, 2, 0, 3)
        wide = torch.promote_types(query.dtype, torch.float32)
        log_z = torch.empty(tokens, heads, group, dtype=wide, device=query.device).permute(1, 2, 0)
        for rows, keys, causal in _parts(runs):
            q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            part, part_log_z = cpu_flash_attention(q, k, v, 0.0, causal, scale=scale)
            if causal:  # the first part of these queries
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
        grad = grad.unflatten(0, query.shape[:2])
        grad_query, (grad_key, grad_value) = torch.empty_like(query), (torch.empty_like(key[:, 0]) for _ in range(2))
        for rows, keys, causal in _parts(ctx.runs):
            q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            g_q, g_k, g_v = cpu_flash_attention_backward(
                grad[:, :, rows], q, k, v, out[:, :, rows], log_z[:, :, rows], 0.0, causal, scale=ctx.scale
            )
            if causal:  # the first part of these tokens: every token is in one run
                grad_query[:, :, rows], grad_key[:, keys], grad_value[:, keys] = g_q, g_k.sum(1), g_v.sum(1)
            else:
                grad_query[:, :, rows] += g_q
                grad_key[:, keys] += g_k.sum(1)
                grad_value[:, keys] += g_v.sum(1)
        return grad_query.flatten(0, 1), grad_key, grad_value, None, None


def _parts(runs: Runs) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, causal): every run with itself first, then the descendants of each run with it."""
    for start, stop, _ in runs:
        yield slice(start, stop), slice(start, stop), True
    for start, stop, end in runs:
        if stop < end:
            yield slice(stop, end), slice(start, stop), False
