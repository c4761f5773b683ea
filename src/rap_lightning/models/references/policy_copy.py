"""References that are a second copy of the trainable weights, on the same frozen ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rap_lightning.batches.types import Batch
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, evaluating
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.base import Reference


class PolicyCopy(Reference):
    """The policy with a copy of its trainable weights in their place: of a LoRA policy, the adapter alone.

    The copy is saved in checkpoints.

    Attributes:
        copied_at: the optimizer step after which the copy is made; at 0, when the policy is loaded and before a
            checkpoint is read, it is of the initial policy.
    """

    copied_at = 0

    def __init__(self) -> None:
        self._trained: dict[str, nn.Parameter] = {}  # the policy's own, for names, dtypes and devices
        self._weights: dict[str, Tensor] = {}

    def shard(self, sharding: Sharding) -> None:
        """Raise ConfigError: the copy would have to be sharded as the policy is."""
        raise ConfigError(
            f"reference {type(self).__name__} can't be used with a sharded policy yet. Use DDP, or the references "
            "Frozen or Stored."
        )

    def to(self, device: torch.device) -> None:
        self._weights = {name: weight.to(device) for name, weight in self._weights.items()}

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Copy at ``copied_at``."""
        if step == 0:
            self._trained, self._weights = {n: p for n, p in policy.named_parameters() if p.requires_grad}, {}
        if step == self.copied_at:
            self._weights = {name: p.detach().clone() for name, p in self._trained.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy; empty until it is made."""
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the copy.

        Raises:
            ConfigError: it is of another policy, or of a run with another reference.
        """
        not_made_yet = not state and not self._weights
        if state.keys() != self._trained.keys() and not not_made_yet:
            raise ConfigError(
                f"the checkpoint holds no state of the reference {type(self).__name__} for this policy. Resume with "
                "the policy and reference of that run."
            )
        self._weights = {name: weight.to(self._trained[name]) for name, weight in state.items()}

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Run one forward pass of the policy with the copy in the place of its own weights."""
        with evaluating(policy):
            return functional_call(policy, self._weights, (batch,))  # type: ignore[no-any-return]


class AdapterAsLoaded(PolicyCopy):
    """The adapter that training continues, as it was loaded: a second copy of the adapter, no second model.

    The default with ``--model.policy.adapter``. The bare base model would be another reference: a trained adapter
    already differs from it, and margins would not begin at 0.
    """

    def check(self, policy: PolicyConfig) -> None:
        """Raise ConfigError for a policy that continues no adapter."""
        if policy.adapter is None:
            raise ConfigError(
                "reference AdapterAsLoaded needs an adapter to continue: set --model.policy.adapter. The reference "
                "of a new adapter (--model.policy.lora.r) is the base model: AdaptersOff."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the adapter is loaded from its own files again."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Keep the adapter that was loaded."""
