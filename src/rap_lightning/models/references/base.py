"""The reference: where its log-probabilities come from.

A reference is no part of the module's state: it is not trained, and is loaded anew when a run goes on. One that changes
during a run gives the checkpoint what it needs to go on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from rap_lightning.batches.types import Batch
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.distributed.sharded_load import load_sharded
from rap_lightning.errors import ConfigError
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.policy import Policy, PolicyConfig, check_head, check_sharing, evaluating


class Reference(ABC):
    """Gives the log-probabilities of a frozen LM.

    ``gives_tokens`` says whether ``token_logps`` is there, for losses that look at tokens; ``gives_any_response``
    whether it knows other responses than those of the data, for losses that look at such.
    """

    gives_tokens: bool = True
    gives_any_response: bool = True

    @property
    def is_initial_policy(self) -> bool:
        """Whether the log-probabilities must equal the policy's before the first step."""
        return True

    def check(self, policy: PolicyConfig) -> None:  # noqa: B027 (these four: nothing to do is a fair default)
        """Raise ConfigError where this reference doesn't go with the policy. Called before anything is loaded."""

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:  # noqa: B027
        """Load what is needed. Called once, with the policy."""

    def shard(self, sharding: Sharding) -> None:  # noqa: B027
        """Be sharded as the policy is. Called before ``load``, so that no rank ever holds a model whole."""

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move to the policy's device."""

    def follow(self, policy: Policy, step: int) -> None:  # noqa: B027
        """Called when the policy is loaded, with step 0, and after each optimizer step, with its number."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold so that a resumed run goes on with the same reference."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take up what ``state_dict`` gave."""

    def prepare(  # noqa: B027
        self, policy: Policy, batches: Iterable[tuple[Batch, ...]], *, total: int, fresh: bool, precision: str
    ) -> None:
        """Called before the first batch of a run with all of them.

        Args:
            policy: already on its device.
            batches: of this rank; the ranks have equally many, of as many forward passes.
            total: how many.
            fresh: whether the policy is still the initial one.
            precision: the trainer's.
        """

    @property
    def wants_batches(self) -> bool:
        """Whether ``prepare`` looks at the batches, so that they are worth collating."""
        return type(self).prepare is not Reference.prepare

    @abstractmethod
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """[M] float32 nats, without gradient."""

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        """[2B] float32 nats, without gradient."""
        return sum_by_segment(self.token_logps(policy, batch), batch.segment, len(batch.lengths))


class Frozen(Reference):
    """A second model, held beside the policy.

    Args:
        path: a Hugging Face folder or Hub id; by default the policy's own.
        revision: of ``path`` on the Hub.
        adapter: a LoRA adapter to put on it, a peft folder or Hub id; by default that which the policy continues, if
            any, and none on another ``path``.
    """

    def __init__(self, path: str | None = None, revision: str | None = None, adapter: str | None = None) -> None:
        if revision is not None and path is None:
            raise ConfigError("reference Frozen: revision has no effect without path; give both, or neither.")
        self.path, self.revision, self.adapter = path, revision, adapter
        self._model: Policy | None = None
        self._sharding: Sharding | None = None

    @property
    def is_initial_policy(self) -> bool:
        """True unless another model or adapter was named."""
        return self.path is None and self.adapter is None

    def source(self, policy: PolicyConfig) -> PolicyConfig:
        """What is loaded: the initial policy, unless another model or adapter was named."""
        if self.path is not None:
            return PolicyConfig(
                path=self.path, revision=self.revision, attn_implementation=policy.attn_implementation,
                trust_remote_code=policy.trust_remote_code, adapter=self.adapter,
            )  # fmt: skip
        if self.adapter is not None:
            return replace(policy, lora=None, adapter=self.adapter, adapter_revision=None)
        return policy

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:
        """Load the model, without gradients."""
        source = self.source(policy)
        if self.path is not None and source.load_tokenizer().get_vocab() != policy.load_tokenizer().get_vocab():
            raise ConfigError(
                f"reference Frozen: {self.path} has another tokenizer than the policy {policy.path}, so their "
                "log-probabilities are of different tokens. Use a reference of the same family."
            )
        if self._sharding is not None:
            self._model, _ = load_sharded(source, dtype, self._sharding, trained=False)
        else:
            self._model = Policy(source.load_initial(dtype)).requires_grad_(False).eval()
        check_head(self._model)
        check_sharing(self._model)

    def shard(self, sharding: Sharding) -> None:
        """Remember how, for when the model is loaded."""
        self._sharding = sharding

    def to(self, device: torch.device) -> None:
        """Move the model; a sharded one is where it belongs."""
        if self._sharding is None:
            self.model.to(device)

    @property
    def model(self) -> Policy:
        """The frozen model, once loaded."""
        assert self._model is not None, "load comes first"
        return self._model

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """One forward pass of the frozen model."""
        return self.model(batch)  # type: ignore[no-any-return]


class AdaptersOff(Reference):
    """The policy's own weights without its adapter: no second model in memory. Needs an adapter.

    With an adapter that is continued (``--model.policy.adapter``) this is the bare base model, which is not where the
    policy begins; AdapterAsLoaded, the default there, is.
    """

    def __init__(self) -> None:
        self._continued = False

    @property
    def is_initial_policy(self) -> bool:
        """True for a new adapter, which begins as no change at all."""
        return not self._continued

    def check(self, policy: PolicyConfig) -> None:
        """Refuse a policy without an adapter: policy and reference would be one and the same."""
        self._continued = policy.adapter is not None
        if not policy.adapts:
            raise ConfigError(
                "reference AdaptersOff needs an adapter to switch off. Set --model.policy.lora.r, or use Frozen."
            )

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """One forward pass with the adapter disabled."""
        frozen = [p for p in policy.parameters() if not p.requires_grad]
        with evaluating(policy), policy.model.disable_adapter():
            logps: Tensor = policy(batch)
        for p in frozen:  # peft sets all of an adapter to be trained when it is on again
            p.requires_grad_(False)
        return logps


class NoReference(Reference):
    """For losses that need none."""

    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Never called: a loss that needs a reference refuses this one when the run is configured."""
        raise AssertionError("NoReference has no log-probabilities")
