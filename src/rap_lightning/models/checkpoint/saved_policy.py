"""The policy in a checkpoint, whichever strategy wrote it: one file (one device, DDP), FSDP2 shards, DeepSpeed ZeRO.

models/checkpoint/open_saved.py finds out which, and :func:`restored` builds the policy. Weights are read by name, when
they are asked for: optimizer states, and the base model of an adapter's run, never are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.read_checkpoint import read_checkpoint
from rap_lightning.models.checkpoint.sharded_folder import META, PlainReader, short
from rap_lightning.models.digests import base_digest, same_base
from rap_lightning.models.policy import Policy, of_adapter
from rap_lightning.models.policy_config import Lora, PolicyConfig

PREFIX = "policy."
FACTS = "rap_lightning_facts"
"""Where a checkpoint keeps what a model card says of its run."""


class SavedPolicy(ABC):
    """A checkpoint's record and weights.

    Attributes:
        path: of the file or folder.
        meta: everything but weights and optimizer states.
        verified: whether its content was compared with its checksums.
    """

    verified = False

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        if "rap_lightning" not in meta:
            raise ConfigError(f"{path} is not a checkpoint of rap-lightning.")
        self.path, self.meta = path, meta

    @property
    def record(self) -> dict[str, Any]:
        """What the module recorded: the policy's config, the goal template."""
        return cast(dict[str, Any], self.meta["rap_lightning"])

    @property
    def adapts(self) -> bool:
        """Whether an adapter was trained."""
        return bool(self.record["policy"].get("lora") or self.record["policy"].get("adapter"))

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of the policy's saved tensors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the policy's weights; float32 unless the checkpoint records it."""
        return torch.float32

    @abstractmethod
    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return those of the policy's tensors, on the CPU.

        Raises:
            ConfigError: the files are damaged.
        """


def config_of(options: dict[str, Any], path: Path, *, trust_remote_code: bool) -> PolicyConfig:
    """Return a recorded policy's config for use outside of training, on any machine.

    Args:
        options: the record's ``policy``.
        path: of the checkpoint, for messages.
        trust_remote_code: the caller's choice; what a file says about running code is never followed.

    Raises:
        ConfigError: the record is of another version.
    """
    training = {"activation_offloading": False, "compile": False, "gradient_checkpointing": False}
    options = options | training | {"trust_remote_code": trust_remote_code}
    lora = options.pop("lora")
    try:
        return PolicyConfig(**options, lora=Lora(**lora) if lora else None)
    except TypeError as error:
        raise ConfigError(f"{path} was written by another version of rap-lightning: {error}") from error


def restored(saved: SavedPolicy, config: PolicyConfig, dtype: torch.dtype) -> Policy:
    """Build the policy with the checkpoint's weights; an adapter's base model is loaded from its files, in ``dtype``.

    Raises:
        ConfigError: the checkpoint is of another model, or its adapter of another base.
    """
    policy = config.build(dtype)
    state = policy.state_dict()
    _refuse_other_base(saved, config, policy)
    if saved.adapts:
        wanted = {name for name, p in policy.named_parameters() if p.requires_grad or of_adapter(name)}
    else:  # of tied weights one name is enough
        present = {state[name].data_ptr() for name in saved.names if name in state}
        wanted = {name for name, value in state.items() if name in saved.names or value.data_ptr() not in present}
    missing, unexpected = sorted(wanted - set(saved.names)), sorted(set(saved.names) - state.keys())
    if missing or unexpected:
        raise ConfigError(
            f"{saved.path} doesn't fit the model at {config.path}: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    del state
    try:
        policy.load_state_dict(saved.read(wanted), strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{saved.path} doesn't fit the model at {config.path}: {reason}") from error
    policy.causal_lm.tie_weights()
    return policy


def _refuse_other_base(saved: SavedPolicy, config: PolicyConfig, policy: Policy) -> None:
    """Raise ConfigError where an adapter would be put on a base model that it wasn't trained on."""
    then = saved.record.get("digests", {}).get("base")
    if not saved.adapts or then is None or saved.record["policy"].get("quantize"):
        return
    if "torch.float16" in then.split(":")[0].split(","):
        return  # in numbers that the base model's own dtype can't reproduce
    if not same_base(then, base_digest(policy)):
        raise ConfigError(
            f"the checkpoint's adapter was trained on another base model than what is now at {config.path}. "
            "Put back the base model that the run began with."
        )


class OneFile(SavedPolicy):
    """What one device and DDP write."""

    def __init__(self, path: Path) -> None:
        content = read_checkpoint(path)
        state = content.pop("state_dict", {})
        self._state = {n.removeprefix(PREFIX): value for n, value in state.items() if n.startswith(PREFIX)}
        content.pop("optimizer_states", None)
        super().__init__(path, content)

    @property
    def names(self) -> Collection[str]:
        return self._state.keys()

    @property
    def dtype(self) -> torch.dtype:
        return _most_common([value.dtype for value in self._state.values()])

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: self._state[name] for name in names}


class Shards(SavedPolicy):
    """What Lightning's ModelParallelStrategy writes with torch.distributed.checkpoint."""

    def __init__(self, path: Path) -> None:
        meta = path / META
        if not meta.is_file():
            raise ConfigError(f"{path}: {META} is missing, which says what was trained. Was the copy interrupted?")
        self._reader = PlainReader(path)
        try:
            metadata = self._reader.read_metadata()
            content = torch.load(meta, map_location="cpu", weights_only=True)
            super().__init__(path, content)
        except ConfigError:
            raise
        except Exception as error:  # broken files fail with any type of error
            raise ConfigError(f"{path} can't be read as a sharded checkpoint: {short(error)}") from error
        lead = f"state_dict.{PREFIX}"
        entries = {k: v for k, v in metadata.state_dict_metadata.items() if k.startswith(lead) and hasattr(v, "size")}
        self._entries: dict[str, Any] = {key.removeprefix(lead): entry for key, entry in entries.items()}

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    @property
    def dtype(self) -> torch.dtype:
        return _most_common([entry.properties.dtype for entry in self._entries.values()])

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict_loader import load

        wanted = {name: self._entries[name] for name in names}
        state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in wanted.items()}
        try:
            load(
                {f"state_dict.{PREFIX}{name}": value for name, value in state.items()},
                storage_reader=self._reader, no_dist=True,
            )  # fmt: skip
        except Exception as error:
            raise ConfigError(
                f"{self.path}: its shards can't be read, one is missing, cut off or damaged: {short(error)}"
            ) from error
        return state


def _most_common(dtypes: list[torch.dtype]) -> torch.dtype:
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return Counter(floating).most_common(1)[0][0] if floating else torch.float32
