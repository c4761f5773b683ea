"""The reference of a run that begins with a warm-up."""

from __future__ import annotations

from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.errors import ConfigError
from rap_lightning.models.references.policy_copy import PolicyCopy


class Warmed(PolicyCopy):
    """The policy after the warm-up: a copy of its trainable weights, made after the warm-up's last step.

    Before that there is none. The copy is saved in checkpoints, so that a resumed run continues exactly; of a LoRA
    policy it is the adapter, on the same base model.

    Args:
        steps: optimizer steps of the warm-up.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.copied_at = steps

    def shard(self, sharding: Sharding) -> None:
        """Raise ConfigError: the copy would have to be sharded as the policy is."""
        raise ConfigError(
            "--model.warm_up can't be used with a sharded policy yet, where the loss needs a reference. Use DDP, or "
            "two runs: --model.loss SFT, then another from its exported folder."
        )
