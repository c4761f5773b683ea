"""The reference of a run that begins with a warm-up."""

from __future__ import annotations

import torch
from torch import Tensor

from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy
from rap_lightning.models.references.policy_copy import HeldWeights


class Warmed(HeldWeights):
    """The policy as the warm-up left it: a copy of its trainable weights, made after the warm-up's last step.

    Before that there is none. The copy goes into the checkpoint, so that a resumed run goes on exactly; of an adapter
    it is the adapter, over the same base model.

    Args:
        steps: optimizer steps of the warm-up.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self._devices: dict[str, torch.device] = {}

    def shard(self, sharding: Sharding) -> None:
        """Refuse: the copy would have to be sharded as the policy is."""
        raise ConfigError(
            "--model.warm_up doesn't go with a sharded policy yet, where the loss needs a reference. Use DDP, or two "
            "runs: --model.loss SFT, then another from its exported folder."
        )

    @torch.no_grad()
    def follow(self, policy: Policy, step: int) -> None:
        """Copy when the warm-up is over."""
        if step == 0:
            self._devices = {name: p.device for name, p in policy.named_parameters() if p.requires_grad}
        if step == self.steps:
            super().follow(policy, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The copy, once there is one."""
        return dict(self._weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the copy; none, of a checkpoint within the warm-up.

        Raises:
            ConfigError: it is of another policy.
        """
        if state and state.keys() != self._devices.keys():
            raise ConfigError(
                "the checkpoint's reference is of another policy than this one. Go on with the options that the run "
                "began with."
            )
        self._weights = {name: weight.to(self._devices[name]) for name, weight in state.items()}
