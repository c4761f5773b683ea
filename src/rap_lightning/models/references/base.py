"""References: where reference log-probabilities come from.

A reference isn't part of the module's state dict: it is not trained, and is loaded again when a run resumes. One that
changes during a run returns what a checkpoint must hold from ``state_dict``. In the order of a run:
``check`` → ``shard`` → ``load`` → ``follow`` (step 0) → ``load_state_dict`` → ``to`` → ``prepare`` → ``token_logps``
and ``follow`` at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from rap_lightning.batches.types import Batch
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig


class Reference(ABC):
    """Computes the log-probabilities of a frozen LM.

    Attributes:
        gives_tokens: whether there are ``token_logps``, for losses that look at tokens.
        gives_any_response: whether it can be asked for responses that are not in the data.
    """

    gives_tokens: bool = True
    gives_any_response: bool = True

    @property
    def is_initial_policy(self) -> bool:
        """Whether the log-probabilities must equal the policy's before the first step."""
        return True

    def check(self, policy: PolicyConfig) -> None:  # noqa: B027 (the defaults of these do nothing)
        """Raise ConfigError where this reference can't be used with the policy, before anything is loaded."""

    def shard(self, sharding: Sharding) -> None:  # noqa: B027
        """Be sharded as the policy is. Called before ``load``, so that no rank ever holds a whole model."""

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:  # noqa: B027
        """Load what is needed. Called once, after the policy is loaded."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move to the policy's device."""

    def digest(self, policy: PolicyConfig, initial: str) -> str | None:
        """Return a digest of the weights that a resumed run must load again, and None where a checkpoint has them.

        Called after ``load``; ``initial`` is the ``base_digest`` of the policy as it was loaded.
        """
        return None

    def follow(self, policy: Policy, step: int) -> None:  # noqa: B027
        """Update from the policy. Called with step 0 when it is loaded, and with its number after every step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold for a resumed run to continue with the same reference."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore what ``state_dict`` returned."""

    def prepare(  # noqa: B027
        self, policy: Policy, batches: Iterable[tuple[Batch, ...]], *, total: int, fresh: bool, precision: str
    ) -> None:
        """Look at all batches of a run before the first of them is used.

        Args:
            policy: already on its device.
            batches: of this rank, each as its forward passes; all ranks have equally many of both.
            total: the number of batches.
            fresh: whether the policy is still the initial one.
            precision: the trainer's.
        """

    @property
    def wants_batches(self) -> bool:
        """Whether ``prepare`` uses the batches, so that they must be collated."""
        return type(self).prepare is not Reference.prepare

    @abstractmethod
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Return the log-probability of each response token, [M] float32 nats, without gradient."""

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Return the log-probability of each response, [2B] float32 nats, without gradient."""
        return sum_by_segment(self.token_logps(policy, batch), batch.segment, len(batch.lengths))


class NoReference(Reference):
    """For losses that need none."""

    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Fail: a loss that needs a reference refuses this one when the run is configured."""
        raise AssertionError("NoReference has no log-probabilities")
