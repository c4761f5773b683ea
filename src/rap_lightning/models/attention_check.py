"""A GPU's attention kernels against masked attention, gradients included, before the first call of their kind.

Compilers, drivers and torch versions differ, and no GPU run of these paths is recorded, so each process runs a kernel
on a small tree with the options that a layer asks for. A path that fails is not used, with one warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rap_lightning.batches.types import Forest
from rap_lightning.errors import first_line
from rap_lightning.models import masked_attention
from rap_lightning.models.attention_choice import Demand
from rap_lightning.models.autocast import without_autocast
from rap_lightning.models.masked_attention import AttentionCall

TOKENS, FORK, LEAF = 391, 125, 257  # neither a multiple of a kernel's block
WINDOW = 100  # shorter than a path
BOUND = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_BOUND = 0.05
"""Largest difference, relative to the largest number; float32 kernels may multiply in TensorFloat-32."""


@cache
def passes(
    name: str, attend: Callable[[AttentionCall], Tensor], demand: Demand, heads: int, groups: int, device: torch.device
) -> bool:
    """Return whether output and gradients on a small tree are those of masked attention; warn where not.

    Only an error of the path itself counts as a failure. One of masked attention, or no memory, is an error of the run.
    """
    # a call may come first in a validation, which is in inference mode, or under autocast
    with torch.inference_mode(False), without_autocast(device):
        call, up = example(demand, heads, groups, device)
        expected = with_gradients(masked_attention.attend, call, up)
        try:
            found = with_gradients(attend, call, up)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers fail in many ways; a missing C compiler is the usual one
            reason = f"{type(error).__name__}: {first_line(error)}"
        else:
            worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
            if worst <= BOUND.get(demand.dtype, HALF_BOUND):
                return True
            reason = f"it differs from masked attention by {worst:.2g}, relative"
    warnings.warn(f"attention path {name} is not used on {device}: {reason}", stacklevel=2)
    return False


def example(demand: Demand, heads: int, groups: int, device: torch.device) -> tuple[AttentionCall, Tensor]:
    """Return a call on a tree of two leaves, and the gradient of its output."""
    runs = ((0, FORK, TOKENS), (FORK, LEAF, LEAF), (LEAF, TOKENS, TOKENS))
    ends = torch.cat([torch.full((stop - start,), end, device="cpu") for start, stop, end in runs])
    forest = Forest(ends.to(device), runs, (((0, LEAF),), ((0, FORK), (LEAF, TOKENS))))
    # a run may call this within `with device:`, where a generator of the host draws nothing
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, demand.dtype)

    q, k = draw(1, heads, TOKENS, demand.head_size), draw(1, groups, TOKENS, demand.head_size)
    v, up = draw(1, groups, TOKENS, demand.value_size), draw(1, heads, TOKENS, demand.value_size)
    call = AttentionCall(
        q, k, v, forest, demand.head_size**-0.5, None if demand.window is None else WINDOW, demand.softcap,
        draw(heads) if demand.sinks else None,
    )  # fmt: skip
    return call, up


@torch.enable_grad()
def with_gradients(attend: Callable[[AttentionCall], Tensor], call: AttentionCall, up: Tensor) -> list[Tensor]:
    """Return the output and the gradients of query, key, value and, where there are some, sinks."""
    names = [name for name in ("query", "key", "value", "sinks") if getattr(call, name) is not None]
    inputs = {name: getattr(call, name).detach().clone().requires_grad_() for name in names}
    out = attend(dataclasses.replace(call, **inputs))
    return [out, *torch.autograd.grad(out, list(inputs.values()), up)]
