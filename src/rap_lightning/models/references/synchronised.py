"""A reference that follows the policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, PolicyConfig
from rap_lightning.models.references.policy_copy import HeldWeights


class Synchronised(HeldWeights):
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
        super().__init__()
        if every < 1:
            raise ConfigError(f"reference Synchronised: every must be at least 1 step, found {every}")
        if not 0 < alpha <= 1:
            raise ConfigError(f"reference Synchronised: alpha must be above 0 and at most 1, found {alpha}")
        self.every, self.alpha = every, alpha

    def check(self, policy: PolicyConfig) -> None:
        """Refuse to mix adapters."""
        if policy.adapts and self.alpha != 1:
            raise ConfigError(
                f"reference Synchronised: with an adapter alpha must be 1, found {self.alpha:g}: mixing the factors of "
                "two low-rank updates does not mix the updates. Set --model.reference.alpha 1, or train all weights."
            )

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Copy at step 0; mix every ``every`` steps."""
        super().follow(policy, step)
        if step > 0 and step % self.every == 0:
            for name, p in policy.named_parameters():
                if name in self._weights:
                    self._weights[name].lerp_(p.detach(), self.alpha)

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
