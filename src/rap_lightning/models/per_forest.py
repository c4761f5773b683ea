"""Tensors that belong to a forest and are the same in all layers: computed in the first layer, reused in the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from rap_lightning.batches.types import Forest

P = ParamSpec("P")
R = TypeVar("R")


def once_per_forest(compute: Callable[Concatenate[Forest, P], R]) -> Callable[Concatenate[Forest, P], R]:
    """Remember a function's results, by its other arguments, for the latest forest.

    Only for the latest: a result may be as large as a mask. Where layers are recomputed in the backward pass for an
    earlier forest than the latest, they are computed again.
    """
    latest: list[Forest] = []
    results: dict[Hashable, R] = {}

    @functools.wraps(compute)
    def remembered(forest: Forest, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not latest or latest[0] is not forest:
            latest[:] = [forest]
            results.clear()
        key = (args, *sorted(kwargs.items()))
        if key not in results:
            # the first layer may be a reference's in inference mode, whose tensors a backward pass can't save
            with torch.inference_mode(False):
                results[key] = compute(forest, *args, **kwargs)
        return results[key]

    return remembered


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the host to a device; on CUDA from pinned memory, so that the host doesn't wait for it."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
