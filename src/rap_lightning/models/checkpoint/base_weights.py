"""An adapter's base model, which checkpoints leave out: it never changes, and may be a thousand times larger."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rap_lightning.models.policy import Policy, of_adapter


def base_weights(policy: Policy | None) -> dict[str, Tensor]:
    """Return the weights below the policy's adapter, named as in the module's state dict; empty without an adapter."""
    if policy is None or not policy.has_adapter:
        return {}
    named = policy.named_parameters(remove_duplicate=False)  # a tied head has two names
    return {f"policy.{name}": p.detach() for name, p in named if not (p.requires_grad or of_adapter(name))}


def without_base(state_dict: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the base weights; 4-bit ones have scales and tables below their own name."""
    return {
        name: value
        for name, value in state_dict.items()
        if name not in base and name.partition(".weight.")[0] + ".weight" not in base
    }
