"""A reference that follows the policy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, PolicyConfig, evaluating
from rap_lightning.models.reference import Reference
from rap_lightning.models.sharding import Sharding


class Synchronised(Reference):
    """TR-DPO's reference: every ``every`` optimizer steps it becomes alpha · policy + (1 - alpha) · reference.

    It starts as the policy does. Only the trainable weights are held a second time, and only they go into the
    checkpoint, so that a resumed run goes on exactly; of an adapter that is the adapter, over the same base model.

    Args:
        every: τ, optimizer steps between updates.
        alpha: α, above 0; 1 copies the policy. An adapter can only be copied: a mixture of two low-rank updates is not
            the mixture of their factors.

    Source: Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656, section 4: soft updates are α < 1, hard ones
    α = 1. The defaults are those of TRL's ref_model_mixup_alpha and ref_model_sync_steps.
    """

    def __init__(self, every: int = 512, alpha: float = 0.6) -> None:
        if every < 1:
            raise ConfigError(f"reference Synchronised: every must be at least 1 step, found {every}")
        if not 0 < alpha <= 1:
            raise ConfigError(f"reference Synchronised: alpha must be above 0 and at most 1, found {alpha}")
        self.every, self.alpha = every, alpha
        self._weights: dict[str, Tensor] = {}

    def check(self, policy: PolicyConfig) -> None:
        """Refuse to mix adapters."""
        if policy.lora is not None and self.alpha != 1:
            raise ConfigError(
                f"reference Synchronised: with an adapter alpha must be 1, found {self.alpha:g}: mixing the factors of "
                "two low-rank updates does not mix the updates. Set --model.reference.alpha 1, or train all weights."
            )

    def shard(self, sharding: Sharding) -> None:
        """Refuse: the copy would have to be sharded as the policy is, and so would the checkpoint."""
        raise ConfigError(
            "reference Synchronised doesn't go with a sharded policy yet. Use DDP, or the references Frozen or "
            "AdaptersOff."
        )

    def to(self, device: torch.device) -> None:
        """Move the copy."""
        self._weights = {name: weight.to(device) for name, weight in self._weights.items()}

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Copy at step 0; mix every ``every`` steps."""
        trained = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
        if step == 0:
            self._weights = {name: weight.clone() for name, weight in trained.items()}
        elif step % self.every == 0:
            for name, weight in trained.items():
                self._weights[name].lerp_(weight, self.alpha)

    def state_dict(self) -> dict[str, Tensor]:
        """The copy."""
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the copy.

        Raises:
            ConfigError: it is of another policy, or of a run with another reference.
        """
        if state.keys() != self._weights.keys():
            raise ConfigError(
                "the checkpoint holds no state of the reference Synchronised for this policy. Go on with the reference "
                "that the run began with."
            )
        self._weights = {name: state[name].to(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """One forward pass of the policy with the copy in the place of its own weights."""
        with evaluating(policy):
            return functional_call(policy, self._weights, (batch,))  # type: ignore[no-any-return]
