"""Attention over a forest by FlexAttention, for GPUs: blocks of keys that no query of a block sees are never touched.

Before it is first used on a device it is held against attention with an explicit mask, gradients included; where it
can't be compiled there, or gives something else, the mask it is. Shape legend as in ``attention``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rap_lightning.batches.types import Forest

BLOCK = 128
Masked = Callable[[Tensor, Tensor, Tensor, Tensor, float, float | None], Tensor]
"""(query, key, value, [T, T] bool, scale, softcap) -> [1, H, T, D]"""


def block_mask(forest: Forest, positions: Tensor, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries sees, by the forest's rule; ``positions`` is [T] int64."""
    end, tokens = forest.end, len(forest.end)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (key <= query) & (query < end[key])
        return on_path if window is None else on_path & (positions[query] - positions[key] < window)

    return create_block_mask(sees, None, None, tokens, tokens, device=end.device.type, BLOCK_SIZE=BLOCK)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """[1, H, T, D] of query [1, H, T, D], key and value [1, G, T, D]."""

    kernel: Any = _compiled() if query.is_cuda else flex_attention
    score_mod = None if softcap is None else _capped(softcap)
    out: Tensor = kernel(query, key, value, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=True)
    return out


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


@cache
def works(device: torch.device, dtype: torch.dtype, heads: int, groups: int, size: int, masked: Masked) -> bool:
    """Whether a small forest comes out as ``masked`` has it, and so do its gradients; says so once where it doesn't."""
    generator = torch.Generator().manual_seed(0)
    tokens, fork, leaf = 3 * BLOCK + 7, BLOCK - 3, 2 * BLOCK + 1
    ends = [tokens] * fork + [leaf] * (leaf - fork) + [tokens] * (tokens - leaf)
    forest = Forest(torch.tensor(ends, device=device), (), ())
    index = torch.arange(tokens, device=device)
    sees = (index <= index[:, None]) & (index[:, None] < forest.end)
    inputs = [torch.randn(1, n, tokens, size, generator=generator).to(device, dtype) for n in (heads, groups, groups)]
    up = torch.randn(1, heads, tokens, size, generator=generator).to(device, dtype)
    found = []
    try:
        with torch.enable_grad():
            for road in ("flex", "mask"):
                q, k, v = (x.clone().requires_grad_() for x in inputs)
                if road == "flex":
                    out = attend(q, k, v, block_mask(forest, sees.sum(1) - 1, None), size**-0.5, None)
                else:
                    out = masked(q, k, v, sees, size**-0.5, None)
                found.append([out, *torch.autograd.grad(out, (q, k, v), up)])
    except Exception as error:  # whatever a compiler or a driver makes of it
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        bound = 1e-4 if dtype == torch.float32 else 0.05
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
        if worst <= bound:
            return True
        reason = f"it differs by {worst:.2g}, relative"
    warnings.warn(f"FlexAttention is not used on {device}: {reason}. A mask is used, which is slower.", stacklevel=2)
    return False
