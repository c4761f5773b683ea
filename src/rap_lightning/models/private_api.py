"""Private names of torch, transformers and peft that have no public counterpart, each with its reason.

Last checked with torch 2.13, transformers 5.24 and peft 0.21. Everything else under ``models`` and ``distributed`` uses
public names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# `F.scaled_dot_product_attention` picks this kernel on CPUs, but doesn't return its log-sum-exp, without which
# attention over parts of the keys can't be merged; FlexAttention, which does return it, has no backward pass on CPUs.
cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def varlen_flash(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor,
    longest_query: int, longest_key: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call flash attention on sequences of different lengths: (output [t, H, D], log-sum-exp [H, t] float32).

    ``torch.nn.attention.varlen.varlen_attn`` (torch 2.10 and newer) calls this operator and returns the same, but its
    backward pass can't be given another output and log-sum-exp, without which parts of the keys can't be merged.

    Args:
        query: [t, H, D].
        key, value: [u, G, D], where H is a multiple of G.
        query_ends, key_ends: [N + 1] int32, cumulative lengths of the sequences, from 0.
        longest_query, longest_key: tokens of the longest ones.
        causal: whether query i of a sequence sees keys 0 to i, where both are of one length; else it sees all.
        scale: factor on the scores.
    """
    out, log_z, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, query_ends, key_ends, longest_query, longest_key, 0.0, causal, False, scale=scale
    )
    if log_z.shape != (query.shape[1], query.shape[0]):  # torch 2.6 pads it to [N, H, longest_query]
        raise NotImplementedError(f"flash attention of torch {torch.__version__} returns its log-sum-exp padded")
    return out, log_z


def varlen_flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_z: Tensor,
    query_ends: Tensor, key_ends: Tensor, longest_query: int, longest_key: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, of arguments as in :func:`varlen_flash`.

    Args:
        grad: [t, H, D] the gradient of ``out``.
        out: [t, H, D].
        log_z: [H, t] float32, contiguous.
    """
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which is 0
    nothing = torch.empty(0, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, log_z, query_ends, key_ends, longest_query, longest_key, 0.0, causal,
        state, nothing, scale=scale,
    )  # fmt: skip
    return grads


def attention_implementation(config: Any) -> str | None:
    """Return the name by which a model looks up its attention function."""
    name: str | None = config._attn_implementation
    return name


@contextmanager
def use_attention(config: Any, name: str | None) -> Iterator[None]:
    """Set that name within a block.

    The public ``model.set_attn_implementation`` walks over all modules and validates the name: too slow for every
    forward pass, and it refuses a model like Gemma 2, which supports our function but declares no support.
    """
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Keep models from looking for several sequences in a row without an attention mask, within a block.

    transformers compares all position ids with each other at every forward pass, and waits for the device to know the
    result (``masking_utils.find_packed_sequence_indices``); no argument of a model says that there is nothing to find.
    """
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def uses_adapter(module: nn.Module) -> bool:
    """Return whether this is a layer with an adapter that takes part in ``forward``."""
    return module.__dict__.get("_disable_adapters", getattr(type(module), "_disable_adapters", None)) is False


def skip_adapter(layer: nn.Module, skipped: bool) -> None:
    """Set what peft's layers look at in ``forward``; the public ``enable_adapters`` sets gradients too."""
    layer.__dict__["_disable_adapters"] = skipped


def is_stateful(model: Any) -> bool:
    """Return whether a model keeps a recurrent state beside keys and values; transformers has no public name for it."""
    return bool(getattr(model, "_is_stateful", False))


def skip_initialization(tensors: Iterable[Tensor]) -> None:
    """Make ``initialize_weights`` leave these tensors alone, as ``from_pretrained`` does with those it has loaded."""
    for tensor in tensors:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def ignored_on_load(model: Any) -> list[str]:
    """Return regular expressions of the names that ``from_pretrained`` doesn't report where a model has no such weight.

    They are needed where weights are read without ``from_pretrained``.
    """
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def save_under_own_names(model: Any) -> None:
    """Make ``save_pretrained`` keep the names that tensors have in memory, which for this model are those of its files.

    ``from_pretrained`` records which names it converted; a model that it didn't make has no such record.
    """
    model._weight_conversions = []
