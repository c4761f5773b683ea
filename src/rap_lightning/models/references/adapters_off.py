"""The policy without its adapter as the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, adapters_off, evaluating, of_adapter
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.base import Reference


class AdaptersOff(Reference):
    """The policy's own weights without its adapter: no second model in memory. Needs an adapter.

    With an adapter that is continued (``--model.policy.adapter``) this is the bare base model, from which the policy
    already differs at the start; the default there is AdapterAsLoaded.
    """

    def __init__(self) -> None:
        self._continued = False

    @property
    def is_initial_policy(self) -> bool:
        """True for a new adapter, which starts without an effect."""
        return not self._continued

    def check(self, policy: PolicyConfig) -> None:
        """Raise ConfigError for a policy without an adapter, which would be its own reference."""
        self._continued = policy.adapter is not None
        if not policy.adapts:
            raise ConfigError(
                "reference AdaptersOff needs an adapter to switch off. Set --model.policy.lora.r, or use Frozen."
            )

    def follow(self, policy: Policy, step: int) -> None:
        """Raise ConfigError for trained weights that stay when the adapter is switched off."""
        if step:  # looked at once
            return
        if left := [name for name, p in policy.named_parameters() if p.requires_grad and not of_adapter(name)]:
            raise ConfigError(
                f"reference AdaptersOff: {left[0]} is trained beside the adapter (peft's option bias), and stays when "
                "the adapter is switched off. Remove --model.reference."
            )

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Run one forward pass with the adapter disabled."""
        with evaluating(policy), adapters_off(policy):
            return policy(batch)  # type: ignore[no-any-return]
