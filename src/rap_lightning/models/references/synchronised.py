"""A reference that follows the policy."""

from __future__ import annotations

import torch

from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.policy_copy import PolicyCopy


class Synchronised(PolicyCopy):
    """TR-DPO's reference: every ``every`` optimizer steps it becomes alpha · policy + (1 - alpha) · reference.

    It starts as the initial policy. Only the trainable weights are copied, and only the copy is saved in checkpoints,
    so that a resumed run continues exactly; of a LoRA policy that is the adapter, on the same base model.

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
        """Raise ConfigError where adapters would be mixed."""
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
