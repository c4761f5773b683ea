"""Private names of torch and transformers that have no public counterpart, each with its reason.

Last checked with torch 2.13 and transformers 5.24. Everything else under ``models`` and ``distributed`` uses public
names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# `F.scaled_dot_product_attention` picks this kernel on CPUs, but doesn't return its log-sum-exp, without which
# attention over parts of the keys can't be merged; FlexAttention, which does return it, has no backward pass on CPUs.
cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
