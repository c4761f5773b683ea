"""Attention over a forest by FlexAttention, for GPUs: blocks of keys that no query of a block sees are skipped.

Before its first use on a device it is compared with masked attention, gradients included. Where it can't be compiled or
differs, :func:`supports` returns False. Shape legend as in ``masked_attention``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rap_lightning.batches.types import Forest
from rap_lightning.models import masked_attention
from rap_lightning.models.masked_attention import AttentionCall, positions

BLOCK = 128
_block_masks: dict[int | None, tuple[Forest, BlockMask]] = {}
"""By window: the mask that the layers of one forward pass share, with the forest it was made for."""


def supports(call: AttentionCall) -> bool:
    """Return whether the call is one for a GPU that FlexAttention computes, and gets right on this device."""
    if not call.query.is_cuda or call.dropout or call.sinks is not None:
        return False
    q, k, v = call.query, call.key, call.value
    if q.shape[-1] != v.shape[-1] or not q.dtype == k.dtype == v.dtype:
        return False
    return works(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[-1])


def attend(call: AttentionCall) -> Tensor:
    """Return [1, H, T, D]."""
    forest, mask = _block_masks.get(call.window, (None, None))
    if mask is None or forest is not call.forest:  # a recomputed layer may come back to an earlier forest
        mask = block_mask(call.forest, call.window)
        _block_masks[call.window] = (call.forest, mask)
    kernel: Any = _compiled() if call.query.is_cuda else flex_attention
    score_mod = None if call.softcap is None else _capped(call.softcap)
    out: Tensor = kernel(
        call.query, call.key, call.value, score_mod=score_mod, block_mask=mask, scale=call.scale, enable_gqa=True
    )
    return out


def block_mask(forest: Forest, window: int | None) -> BlockMask:
    """Return which blocks of keys each block of queries sees."""
    end, position, tokens = forest.end, positions(forest), len(forest.end)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (key <= query) & (query < end[key])
        return on_path if window is None else on_path & (position[query] - position[key] < window)

    return create_block_mask(sees, None, None, tokens, tokens, device=end.device.type, BLOCK_SIZE=BLOCK)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


@cache
def works(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int) -> bool:
    """Return whether output and gradients on a small tree are those of masked attention; warn once where not."""
    generator = torch.Generator().manual_seed(0)
    tokens, fork, leaf = 3 * BLOCK + 7, BLOCK - 3, 2 * BLOCK + 1
    ends = [tokens] * fork + [leaf] * (leaf - fork) + [tokens] * (tokens - leaf)
    forest = Forest(torch.tensor(ends, device=device), ((0, tokens, tokens),), ())
    q, k, v, up = (
        torch.randn(1, count, tokens, size, generator=generator).to(device, dtype)
        for count in (heads, groups, groups, heads)
    )
    call = AttentionCall(q, k, v, forest, size**-0.5)
    try:
        pairs = zip(_with_gradients(attend, call, up), _with_gradients(masked_attention.attend, call, up), strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        if worst <= (1e-4 if dtype == torch.float32 else 0.05):
            return True
        reason = f"it differs from masked attention by {worst:.2g}, relative"
    except Exception as error:  # compilers and drivers fail in many ways; a missing C compiler is the usual one
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(f"FlexAttention is not used on {device}: {reason}. A mask is used, which is slower.", stacklevel=2)
    return False


@torch.enable_grad()
def _with_gradients(attend: Callable[[AttentionCall], Tensor], call: AttentionCall, up: Tensor) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in (call.query, call.key, call.value))
    out = attend(dataclasses.replace(call, query=q, key=k, value=v))
    return [out, *torch.autograd.grad(out, (q, k, v), up)]
