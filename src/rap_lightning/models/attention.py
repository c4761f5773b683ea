"""Attention over a forest of sequences, for any transformers model that looks up its kernel in ``AttentionInterface``.

The rule is in :class:`rap_lightning.batches.types.Forest`: a query sees the keys on its path from the root. How a call
is computed depends on what the layer asks for and where; :data:`PATHS` lists the ways in order:

- ``blockwise_attention``, on CPUs, for plain attention;
- ``flex_attention``, on GPUs, sliding windows and soft-capping included;
- ``masked_attention`` for the rest: on CPUs, sliding windows shorter than a sequence and soft-capping; attention sinks
  and dropout everywhere.

A further way (say, cumulative lengths for a varlen kernel, where the forest is flat) is one more module with
``supports`` and ``attend``, and one more line in that list. No GPU has been at hand: the speed of neither path there
was ever measured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rap_lightning.batches.types import Forest
from rap_lightning.models import blockwise_attention, flex_attention, masked_attention
from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.private_api import attention_implementation, use_attention

PATHS: tuple[tuple[Callable[[AttentionCall], bool], Callable[[AttentionCall], Tensor]], ...] = (
    (blockwise_attention.supports, blockwise_attention.attend),
    (flex_attention.supports, flex_attention.attend),
    (lambda call: True, masked_attention.attend),
)
"""(supports, attend): the first path that supports a call computes it, [1, H, T, D]."""

NAME = "rap_forest"
WINDOWS = ("sliding_window", "attention_chunk_size")


def forest_attention(config: Any, windows: set[int] | None = None) -> AbstractContextManager[None]:
    """Replace the attention of the model that was built from ``config`` by attention over a forest, within a block.

    The model's forward pass must be given the ``forest``. transformers makes no mask for an implementation that it has
    no mask function for, so none is computed in vain.

    Args:
        config: the text config, which the layers read.
        windows: the sliding windows that layers ask for are added to it.
    """
    from transformers import AttentionInterface

    # a compiler of layers must not unroll the kernel calls, which differ from forest to forest
    AttentionInterface.register(NAME, torch.compiler.disable(partial(_attention, windows=windows)))
    return use_attention(config, NAME)


def attention_as_now(config: Any) -> AbstractContextManager[None]:
    """Return a block, to be entered later, in which the attention implementation is the one of now."""
    return use_attention(config, attention_implementation(config))


def declared_windows(config: Any) -> set[int]:
    """Return the windows or chunks, in tokens, within which layers attend according to the model's config."""
    if getattr(config, "use_sliding_window", True) is False:
        return set()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) == {"full_attention"}:
        return set()
    return {size for name in WINDOWS if (size := getattr(config, name, None))}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    forest: Forest, scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, windows: set[int] | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention as transformers calls it: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if windows is not None and sliding_window is not None:
        windows.add(sliding_window)
    call = AttentionCall(
        query, key, value, forest,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window if sliding_window is not None and sliding_window < forest.longest else None,
        softcap=softcap, sinks=s_aux, dropout=dropout if module.training else 0.0,
    )  # fmt: skip
    attend = next(attend for supports, attend in PATHS if supports(call))
    return attend(call).transpose(1, 2), None
