"""Activations in host memory between the forward and the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


def activations_on_host(*, pin_memory: bool = True) -> saved_tensors_hooks:
    """Keep the tensors that the forward pass saves for the backward pass on the host, except weights.

    torch's ``save_on_cpu`` alone also copies weights: the whole model for each forward pass, although they stay on the
    device anyway.
    """
    host = save_on_cpu(pin_memory=pin_memory)

    def pack(tensor: Tensor) -> Any:
        return tensor if is_weight(tensor) else host.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        tensor: Tensor = packed if isinstance(packed, Tensor) else host.unpack_hook(packed)
        return tensor

    return saved_tensors_hooks(pack, unpack)


def is_weight(tensor: Tensor) -> bool:
    """Return whether a saved tensor is a parameter or a view of one: linear layers save their weight transposed."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
