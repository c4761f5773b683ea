"""Memory: activations on the host; and out of memory, in words: which batch, how many tokens, and what to change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from rap_lightning.batches.types import Batch
from rap_lightning.errors import OutOfMemory

SIGNS = re.compile(r"out of memory|can't allocate memory|not enough memory|failed to allocate", re.IGNORECASE)


def activations_on_host(*, pin_memory: bool = True) -> saved_tensors_hooks:
    """Keep on the host what a block's forward pass leaves for the backward pass, but for weights.

    torch's ``save_on_cpu`` alone takes weights too: a copy of the whole model for each forward pass, though they stay
    on the device anyway.
    """
    host = save_on_cpu(pin_memory=pin_memory)

    def pack(tensor: Tensor) -> Any:
        return tensor if is_weight(tensor) else host.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed if isinstance(packed, Tensor) else host.unpack_hook(packed)
        return tensor

    return saved_tensors_hooks(pack, unpack)


def is_weight(tensor: Tensor) -> bool:
    """Whether a saved tensor is a parameter, or a view of one: linear layers save their weight transposed."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that no memory is left, on a GPU or in the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and SIGNS.search(str(error)) is not None


@contextmanager
def explained(what: Callable[[], str]) -> Iterator[None]:
    """Say of a block that runs out of memory what it was doing.

    Args:
        what: the message; asked only when it happens.

    Raises:
        OutOfMemory: in the place of torch's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        error.__traceback__ = None  # its frames hold the tensors that took the memory, which a checkpoint may need
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(f"out of memory {what()} ({reason})") from None


def described(parts: Sequence[Batch]) -> str:
    """A batch's size in words."""
    pairs = sum(map(len, parts))
    largest = max(parts, key=lambda part: part.input_ids.numel())
    longest = max(part.forest.longest if part.forest is not None else part.input_ids.shape[1] for part in parts)
    passes = f"{len(parts)} forward passes, the largest of" if len(parts) > 1 else "one forward pass of"
    return (
        f"{pairs} pairs ({', '.join(p for part in parts for p in part.pair_ids[:3])[:120]}) in {passes} "
        f"{largest.input_ids.numel():,} tokens, {len(largest.target):,} of them of responses; the longest sequence has "
        f"{longest:,}"
    )
