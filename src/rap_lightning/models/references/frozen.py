"""A frozen second model as the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rap_lightning.batches.types import Batch
from rap_lightning.distributed.fsdp2 import Sharding
from rap_lightning.distributed.sharded_load import load_sharded
from rap_lightning.errors import ConfigError
from rap_lightning.models.adapters import adapter_digest
from rap_lightning.models.digests import weights_digest
from rap_lightning.models.model_checks import check_head, check_sharing
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.base import Reference


class Frozen(Reference):
    """A second model, held in memory with the policy.

    Args:
        path: a Hugging Face folder or Hub id; by default the policy's own.
        revision: of ``path`` on the Hub.
        adapter: a LoRA adapter to put on it, a peft folder or Hub id; by default the one that the policy continues, if
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
        """Return what is loaded: the initial policy, unless another model or adapter was named."""
        if self.path is not None:
            return PolicyConfig(
                path=self.path, revision=self.revision, attn_implementation=policy.attn_implementation,
                trust_remote_code=policy.trust_remote_code, adapter=self.adapter,
            )  # fmt: skip
        if self.adapter is not None:
            return replace(policy, lora=None, adapter=self.adapter, adapter_revision=None)
        return policy

    def shard(self, sharding: Sharding) -> None:
        """Load the model in parts."""
        self._sharding = sharding

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:
        """Load the model, without gradients.

        Raises:
            ConfigError: it can't be loaded, or has another tokenizer than the policy.
        """
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

    def digest(self, policy: PolicyConfig, initial: str) -> str:
        """Return that of the initial policy, or of another model's files."""
        if self.is_initial_policy:
            return initial
        source = self.source(policy)
        found = weights_digest(source.path, source.revision)
        if source.adapter is not None:
            found += adapter_digest(source.adapter, source.adapter_revision)
        return f"files:{found}:{found}"  # in the parts that same_base compares

    def to(self, device: torch.device) -> None:
        """Move the model; a sharded one is already where it computes."""
        if self._sharding is None:
            self.model.to(device)

    @property
    def model(self) -> Policy:
        """The frozen model, once loaded."""
        assert self._model is not None, "load comes first"
        return self._model

    @torch.no_grad()
    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        # an adapter of its own is taken as it is: the goal's strength is that of the policy's
        return self.model(replace(batch, strength=None))  # type: ignore[no-any-return]
