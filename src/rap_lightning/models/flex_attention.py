"""Attention over a forest by FlexAttention, on GPUs for soft caps and windows: blocks that no query sees are skipped.

The block mask is made on the host from the forest's runs, in O(T) and (T / 128)² small integers, once per forest:
torch's ``create_block_mask`` evaluates the rule for all T² pairs, in 3 T² bytes, and 10 T² with a window.

Shape legend as in ``masked_attention``; N blocks of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rap_lightning.batches.types import Forest
from rap_lightning.models.masked_attention import AttentionCall, host_positions, positions
from rap_lightning.models.per_forest import once_per_forest, to_device

BLOCK = 128


def attend(call: AttentionCall) -> Tensor:
    """Return [1, H, T, D] of a call without dropout."""
    kernel: Any = flex_attention if call.query.device.type == "cpu" else compiled()
    options = {
        "score_mod": None if call.softcap is None else _capped(call.softcap),
        "block_mask": block_mask(call.forest, call.window),
        "scale": call.scale,
        "enable_gqa": call.query.shape[1] != call.key.shape[1],
    }
    out: Tensor
    if call.sinks is None:
        out = kernel(call.query, call.key, call.value, **options)
        return out
    from transformers.integrations.flex_attention import get_flex_attention_lse_kwargs

    # a sink takes exp(sink) / (Z + exp(sink)) of the probability and adds nothing to the output; the gradient of the
    # log-sum-exp log Z is a part of FlexAttention's backward pass
    out, aux = kernel(call.query, call.key, call.value, **options, **get_flex_attention_lse_kwargs(True))
    log_z: Tensor = aux if isinstance(aux, Tensor) else aux.lse  # torch before 2.9 returns the tensor
    return out * torch.sigmoid(log_z - call.sinks.to(log_z.dtype)[:, None])[..., None].to(out.dtype)


@once_per_forest
def block_mask(forest: Forest, window: int | None) -> BlockMask:
    """Return which blocks of keys each block of queries sees, in full or in part."""
    partly, fully = block_tables(forest, window)
    device = forest.end.device
    sees = _on_path(forest.end) if window is None else _within(forest.end, positions(forest), window)
    some, some_columns, full, full_columns = (
        to_device(torch.from_numpy(x)[None, None], device) for table in (partly, fully) for x in _listed(table)
    )
    tokens = len(forest.end)
    return BlockMask.from_kv_blocks(some, some_columns, full, full_columns, BLOCK, sees, (tokens, tokens))


def block_tables(forest: Forest, window: int | None) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which blocks of keys (columns) to compute in part, with the rule, and in full, without: [N, N] bool each.

    Key k is seen by the queries q with k ≤ q < end[k]. So a block of keys is seen somewhere in a later block of queries
    if its largest end exceeds the first query, and everywhere if its smallest end reaches the end of the queries' block
    (in an incomplete last block it can't). With a window the smallest and largest positions of both blocks bound all
    differences: some pairs of blocks are computed in part where nothing is seen, but none is left out.
    """
    ends = np.concatenate([np.full(stop - start, end) for start, stop, end in forest.runs])
    first = np.arange(0, len(ends), BLOCK)
    queries, keys = np.arange(len(first))[:, None], np.arange(len(first))
    seen = (keys == queries) | ((keys < queries) & (np.maximum.reduceat(ends, first) > first[:, None]))
    fully = (keys < queries) & (np.minimum.reduceat(ends, first) >= first[:, None] + BLOCK)
    if window is not None:
        position = host_positions(forest)
        low, high = np.minimum.reduceat(position, first), np.maximum.reduceat(position, first)
        seen &= low[:, None] - high < window
        fully &= high[:, None] - low < window
    return seen & ~fully, fully


def _listed(table: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(number of blocks [N], their columns first [N, N]) of each row."""
    return table.sum(1, dtype=np.int32), np.argsort(~table, 1, kind="stable").astype(np.int32)


def _on_path(end: Tensor) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return sees


def _within(end: Tensor, position: Tensor, window: int) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key]) & (position[query] - position[key] < window)

    return sees


def _capped(softcap: float) -> Callable[..., Tensor]:
    # torch.compile(dynamic=True) makes a symbol of a float in a closure, and FlexAttention's backward pass can't be
    # traced with one (torch 2.13). A string is a constant, so the number that is parsed from it is one too.
    text = repr(float(softcap))

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        cap = float(text)
        return cap * torch.tanh(score / cap)

    return capped


@cache
def compiled() -> Callable[..., Any]:
    """Return the compiled kernel: an error where it can't be fused, never the unfused one, which makes all scores."""
    # a graph for each of window, soft cap and sinks, with and without gradients, and for each model of the process:
    # more than torch's limit of 8, beyond which `fullgraph` is an error. torch before 2.12 has the global limit alone
    more: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, **more)
