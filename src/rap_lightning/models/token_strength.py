"""A factor on the LoRA adapter for each token: W + s BA, with another s for every sequence of a forward pass.

:func:`attach` puts hooks on an adapter, once, and :func:`at_strength` sets what they multiply by within a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rap_lightning.errors import ConfigError


@dataclass
class _Running:
    """The forward pass that runs: the strength of each of its tokens; None leaves the adapter as it is."""

    strength: Tensor | None = None


# A global, as autocast's dtype is: what a hook reaches through its module, the compiler takes for a property of that
# module, whose shape never changes, and it would compile anew for every length (torch 2.13).
RUNNING = _Running()


def attach(model: nn.Module) -> None:
    """Multiply what ``lora_A`` returns by the strength, in every adapted linear layer of a peft model.

    It is [..., r], the smallest tensor of the adapter's path, and the same for every kind of linear layer that peft
    adapts, quantised ones and GPT-2's Conv1D included.
    """
    for _, factor in _scaled(model):
        if _scale not in factor._forward_hooks.values():  # a model may be wrapped again, and s would be squared
            factor.register_forward_hook(_scale)


@contextmanager
def at_strength(strength: Tensor | None) -> Iterator[None]:
    """Set the strength within a block: [R, T] for each token, or [R, 1] for each row."""
    before, RUNNING.strength = RUNNING.strength, strength
    try:
        yield
    finally:
        RUNNING.strength = before


def strength_as_now() -> AbstractContextManager[None]:
    """Return a block, to be entered later, in which the strength is the one of now."""
    return at_strength(RUNNING.strength)


def check_reach(model: nn.Module) -> None:
    """Raise ConfigError for weights, trained or of an adapter, that no strength would reach."""
    reached = {id(factor.weight) for layer, first in _scaled(model) for factor in (first, *layer.lora_B.values())}
    every = model.named_parameters()
    left = [name for name, p in every if (p.requires_grad or ".lora_" in name) and id(p) not in reached]
    if left:
        raise ConfigError(
            f"goal AdapterStrength: {left[0]} is trained and has no strength (and {len(left) - 1} more). It works "
            "with LoRA on linear layers, without DoRA: leave experts, embeddings, convolutions and biases out of "
            "--model.policy.lora.target_modules."
        )


def _scale(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    strength = RUNNING.strength
    if strength is None:
        return None
    if output.dim() != 3:  # a shared expert or the like, which sees the tokens of all rows one after the other
        tokens = output.shape[0]
        if tokens % strength.numel():
            raise ConfigError(
                f"goal AdapterStrength: an adapted layer sees {tokens} tokens of a batch of {strength.numel()}, as "
                "experts do. Leave it out of --model.policy.lora.target_modules."
            )
        strength = strength.flatten().repeat_interleave(tokens // strength.numel())
    return (output * strength[..., None]).to(output.dtype)


def _scaled(model: nn.Module) -> list[tuple[Any, nn.Linear]]:
    """Return the adapted layers with their ``lora_A``, where an adapter adds ``lora_B(lora_A(x))`` to the layer."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    added_up = (MultiheadAttention, ParamWrapper)  # these add BA to the weights, and never call lora_A
    return [
        (layer, factor)
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, added_up)
        for name, factor in layer.lora_A.items()
        if isinstance(factor, nn.Linear) and name not in layer.lora_variant
    ]
