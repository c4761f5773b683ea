"""Attention over a forest of sequences, for any transformers model that looks up its kernel in ``AttentionInterface``.

The rule is in :class:`rap_lightning.batches.types.Forest`: a query sees the keys on its path from the root. There are
four ways to compute it (:data:`PATHS`); which one a call takes is :func:`attention_choice.choices`, a function of the
layer's options and the machine:

- ``blockwise``, on CPUs, for plain attention;
- ``varlen``, on GPUs, for plain attention and attention sinks in half precision: flash attention, no mask;
- ``flex``, on GPUs, for soft caps, sliding windows shorter than a sequence, and float32: FlexAttention, compiled;
- ``mask``, the rest: on CPUs, windows, soft caps and sinks; dropout everywhere. On a GPU it warns of what it costs.

Sequences that share nothing are left to the model's own attention where that is flash attention (:func:`packs_itself`).

On a device other than a CPU a path is compared with ``mask`` before its first use (:mod:`attention_check`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from rap_lightning.batches.types import Forest
from rap_lightning.models import blockwise_attention, flex_attention, masked_attention, varlen_attention
from rap_lightning.models.attention_check import passes
from rap_lightning.models.attention_choice import Choice, Demand, Machine, choices
from rap_lightning.models.autocast import autocast_dtype
from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.private_api import attention_implementation, use_attention

PATHS: Mapping[str, Callable[[AttentionCall], Tensor]] = {
    "blockwise": blockwise_attention.attend,
    "varlen": varlen_attention.attend,
    "flex": flex_attention.attend,
    "mask": masked_attention.attend,
}
"""The function that computes a call, [1, H, T, D], by the name of its path."""

UNCHECKED = ("cpu", "meta")
"""Device types on which a path needs no check: the tests are run on one, and the other computes nothing."""

NAME = "rap_forest"
WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass
class Seen:
    """What layers asked of attention over a forest, for the checks at the start.

    Attributes:
        windows: sliding windows, in tokens.
        paths: the ways in which calls were computed.
        failures: errors that were raised in attention, not in the model's code.
    """

    windows: set[int] = field(default_factory=set)
    paths: set[Choice] = field(default_factory=set)
    failures: list[Exception] = field(default_factory=list)


def forest_attention(config: Any, seen: Seen | None = None) -> AbstractContextManager[None]:
    """Replace the attention of the layers that read this text config by attention over a forest, within a block.

    The model's forward pass must be given the ``forest``; what its layers ask for is added to ``seen``. transformers
    makes no mask for an implementation that it has no mask function for, so no unused one is computed.
    """
    from transformers import AttentionInterface

    # a compiler of layers must not unroll the kernel calls, which differ from forest to forest
    AttentionInterface.register(NAME, torch.compiler.disable(partial(_attention, seen=seen)))
    return use_attention(config, NAME)


def is_flash(implementation: str | None) -> bool:
    """Return whether this ``attn_implementation`` takes packed sequences by their lengths, without a mask.

    These are transformers' ``flash_attention_2`` and newer, and kernels of the Hub like kernels-community/flash-attn2.
    """
    return "flash" in (implementation or "")


def packs_itself(config: Any, forest: Forest) -> bool:
    """Return whether the model's own attention can compute a forest: flash attention, and no sequences that share."""
    return is_flash(attention_implementation(config)) and all(stop == end for _, stop, end in forest.runs)


def sequence_lengths(forest: Forest) -> dict[str, Any]:
    """Return the keyword arguments by which transformers' flash attention tells packed sequences apart.

    Without them it looks for restarts in the position ids in each layer, and waits for the device to find them.
    """
    rows = varlen_attention.parts(forest)[0].queries
    return {
        "cu_seq_lens_q": rows.ends, "cu_seq_lens_k": rows.ends,
        "max_length_q": rows.longest, "max_length_k": rows.longest,
    }  # fmt: skip


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
    softcap: float | None = None, s_aux: Tensor | None = None, seen: Seen | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention as transformers calls it: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    # kernels take one dtype; under autocast a model that rotates in float32 passes float32 queries and bfloat16 values
    dtype = value.dtype
    if dtype == torch.float32:
        dtype = autocast_dtype(query.device) or dtype
    call = AttentionCall(
        query.to(dtype), key.to(dtype), value.to(dtype), forest,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window if sliding_window is not None and sliding_window < forest.longest else None,
        softcap=softcap, sinks=s_aux, dropout=dropout if module.training else 0.0,
    )  # fmt: skip
    if seen is None:
        return PATHS[path_of(call).path](call).transpose(1, 2), None
    if sliding_window is not None:
        seen.windows.add(sliding_window)
    try:
        choice = path_of(call)
        out = PATHS[choice.path](call)
    except Exception as error:
        seen.failures.append(error)
        raise
    seen.paths.add(choice)
    return out.transpose(1, 2), None


def path_of(call: AttentionCall) -> Choice:
    """Return the best way to compute a call that works on its device, and warn of a mask on a GPU."""
    query = call.query
    demand = Demand(
        query.dtype, query.shape[-1], call.value.shape[-1], call.softcap, call.window, call.sinks is not None,
        call.dropout > 0,
    )  # fmt: skip
    choice = _working(demand, query.shape[1], call.key.shape[1], query.device)
    if choice.path == "mask" and query.device.type not in UNCHECKED:
        _warn_of_mask(choice, query.device, masked_attention.cost(call))
    return choice


@cache
def _working(demand: Demand, heads: int, groups: int, device: torch.device) -> Choice:
    *better, mask = choices(demand, Machine.of(device))
    failed = []
    for choice in better:
        path = choice.path
        if device.type in UNCHECKED or passes(path, PATHS[path], demand, heads, groups, device):
            return choice
        failed.append(f"{path} failed its self-check")
    return Choice("mask", "; ".join([*filter(None, [mask.reason]), *failed]))


def _warn_of_mask(choice: Choice, device: torch.device, cost: str) -> None:
    """Warn once for each reason."""
    if (choice, device) not in _warned:
        _warned.add((choice, device))
        warnings.warn(
            f"attention over sequences in one row uses a dense mask on {device}: {choice.reason}. It takes {cost}.",
            stacklevel=2,
        )


_warned: set[tuple[Choice, torch.device]] = set()
