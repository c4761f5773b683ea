"""References that are a second copy of the trainable weights, over the same frozen ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from rap_lightning.batches.types import Batch
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, PolicyConfig, evaluating
from rap_lightning.models.references.base import Reference


class HeldWeights(Reference):
    """The policy with a copy of its trainable weights in their place: of an adapter, the adapter alone.

    The copy is made when the policy is loaded, before a checkpoint is read, so it is of the policy as it began.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def shard(self, sharding: Sharding) -> None:
        """Refuse: the copy would have to be sharded as the policy is."""
        raise ConfigError(
            f"reference {type(self).__name__} doesn't go with a sharded policy yet. Use DDP, or the references Frozen "
            "or Stored."
        )

    def to(self, device: torch.device) -> None:
        """Move the copy."""
        self._weights = {name: weight.to(device) for name, weight in self._weights.items()}

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Copy at step 0."""
        if step == 0:
            self._weights = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """One forward pass of the policy with the copy in the place of its own weights."""
        with evaluating(policy):
            return functional_call(policy, self._weights, (batch,))  # type: ignore[no-any-return]


class AdapterAsLoaded(HeldWeights):
    """The adapter that training continues, as it was loaded: a second copy of the adapter, no second model.

    The default with ``--model.policy.adapter``. The bare base model would be another reference: an adapter that has
    been trained is already away from it, and margins would not begin at 0.
    """

    def check(self, policy: PolicyConfig) -> None:
        """Refuse a policy that continues no adapter."""
        if policy.adapter is None:
            raise ConfigError(
                "reference AdapterAsLoaded needs an adapter to continue: set --model.policy.adapter. A new adapter "
                "(--model.policy.lora.r) has the base model for its reference: AdaptersOff."
            )
