"""The load-balancing loss of a mixture of experts, over the sequences of a batch in any layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError
from rap_lightning.models.per_forest import to_device

Routed = tuple[tuple[Tensor, ...], Tensor]
"""Router logits of each layer, [N, E], and how many sequences each of the N tokens belongs to, [N]."""


def check_router_loss(config: Any, weight: float, *, compiles: bool) -> None:
    """Refuse a weight that is none, and models without routers.

    Raises:
        ConfigError: with what is wrong.
    """
    option = "--model.policy.router_aux_loss"
    if not 0 < weight < math.inf:
        raise ConfigError(f"{option} must be above 0 and finite, found {weight}; leave it out to train without it.")
    text = config.get_text_config()
    if not hasattr(text, "router_aux_loss_coef") or not hasattr(text, "num_experts_per_tok"):
        raise no_routers(type(config).__name__)
    if compiles:
        raise ConfigError(
            f"{option}: compiled layers do not give their router logits. Leave --model.policy.compile out."
        )


def no_routers(name: str) -> ConfigError:
    """Return the error to raise for a model that gives no router logits."""
    return ConfigError(
        f"--model.policy.router_aux_loss: {name} is no mixture of experts whose routers transformers has a "
        "load-balancing loss for. Leave it out."
    )


def router_loss(routed: list[Routed], top_k: int) -> Tensor:
    """Return the load-balancing loss of forward passes, [] float32: E Σ_e f_e P_e, 1 where all experts get the same.

    f_e is the number of assignments to expert e per token and P_e the mean of its probability (Fedus et al. 2021,
    https://arxiv.org/abs/2101.03961, equations 4 to 6), over the tokens of all layers.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # the same in every model's file

    layers = tuple(torch.cat(parts) for parts in zip(*(logits for logits, _ in routed), strict=True))
    counts = torch.cat([counts for _, counts in routed])
    loss = load_balancing_loss_func(layers, layers[0].shape[-1], top_k, counts[None])
    assert isinstance(loss, Tensor)
    return loss


def sequences_of_tokens(batch: Batch) -> Tensor:
    """Return how many sequences each token belongs to, [R * T] float32: 0 for padding, above 1 for shared prefixes."""
    if batch.forest is None:
        return batch.attention_mask.flatten().float()
    counts = torch.zeros(batch.input_ids.numel())
    for path in batch.forest.paths:
        for start, stop in path:
            counts[start:stop] += 1
    return to_device(counts, batch.input_ids.device)
