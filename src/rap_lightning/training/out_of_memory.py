"""Explanation of an out-of-memory error: which batch, how many tokens, and which options take less memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from rap_lightning.batches.types import Batch
from rap_lightning.errors import OutOfMemory, first_line
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.base import Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.training.protocols import PreferenceData

# CPU allocators raise a plain RuntimeError, which only its text tells from others
SIGNS = re.compile(r"out of memory|can't allocate memory|not enough memory|failed to allocate", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that no memory is left, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and SIGNS.search(str(error)) is not None


@contextmanager
def explained(what: Callable[[], str]) -> Iterator[None]:
    """Replace an out-of-memory error of the block by one that says what the block was doing.

    Args:
        what: makes the message; called only after such an error.

    Raises:
        OutOfMemory: in place of torch's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error) or type(error).__name__
        # the traceback's frames hold the tensors that took the memory, which a checkpoint may need now
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(f"out of memory {what()} ({reason})") from None


def size_of(parts: Sequence[Batch]) -> str:
    """Describe the size of a batch that is taken in one or more forward passes."""
    pairs = sum(map(len, parts))
    largest = max(parts, key=lambda part: part.input_ids.numel())
    longest = max(part.forest.longest if part.forest is not None else part.input_ids.shape[1] for part in parts)
    passes = f"{len(parts)} forward passes, the largest of" if len(parts) > 1 else "one forward pass of"
    return (
        f"{pairs} pairs ({', '.join(p for part in parts for p in part.pair_ids[:3])[:120]}) in {passes} "
        f"{largest.input_ids.numel():,} tokens, {len(largest.target):,} of them of responses; the longest sequence has "
        f"{longest:,}"
    )


def advice(
    config: PolicyConfig, policy: Policy | None, loss: PreferenceLoss, reference: Reference,
    data: PreferenceData | None, *, training: bool = True,
) -> str:  # fmt: skip
    """List the options that would take less memory and are not set already.

    Args:
        config, policy, loss, reference, data: of the run.
        training: whether there was a backward pass to come; else only what forward passes take counts.
    """
    options = []
    if data is not None and data.token_budget is None and not data.streaming and not loss.batch_level:
        options.append("--data.token_budget N, at least the longest pair (the same gradients in smaller passes)")
    elif data is not None and data.batch_size > 1:
        options.append("a smaller --data.batch_size with more --trainer.accumulate_grad_batches")
    if training and policy is not None and (not policy.checkpoints or int(config.gradient_checkpointing or 1) > 1):
        options.append("--model.policy.gradient_checkpointing true")
    if isinstance(reference, Frozen):
        options.append("--model.reference Stored (no second model beside the policy)")
    if training and not config.adapts:
        options.append("--model.policy.lora.r 16 (optimizer state for an adapter only)")
    options.append("a smaller --data.max_length")
    return f"To use less memory: {'; '.join(options)}"


def loading_advice(config: PolicyConfig, reference: Reference) -> str:
    """List the options with which weights take less memory and that are not set already."""
    options = []
    if isinstance(reference, Frozen):
        options.append("--model.reference Stored (no second model beside the policy)")
    if config.quantize is None:
        options.append("--model.policy.quantize nf4 with --model.policy.lora.r 16 (4-bit weights, bitsandbytes)")
    options.append("--trainer.strategy fsdp2 on several devices")
    return (
        f"To use less memory: {'; '.join(options)}. Check that no other process uses the device; rap-lightning plan "
        "says what a run takes"
    )
