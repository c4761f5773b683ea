"""Out of memory, in words: which batch, how many tokens, and what to change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from rap_lightning.batches.types import Batch
from rap_lightning.errors import OutOfMemory

SIGNS = re.compile(r"out of memory|can't allocate memory|not enough memory|failed to allocate", re.IGNORECASE)


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
