"""What fit saved of a policy, whichever way it was trained: one file (one device, DDP), FSDP2 shards, DeepSpeed ZeRO.

Weights are read by name, when they are asked for: optimizer states, and of an adapter's run the base model, never are.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rap_lightning.errors import ConfigError
from rap_lightning.models.adapters import of_adapter
from rap_lightning.models.checkpoint.read_checkpoint import read_checkpoint, refuse_damaged
from rap_lightning.models.checkpoint.sharded_files import LISTING, PlainReader, short
from rap_lightning.models.digests import base_digest, same_base
from rap_lightning.models.policy import Lora, Policy, PolicyConfig

PREFIX = "policy."
META = "meta.pt"
"""What Lightning writes beside the shards of ModelParallelStrategy."""


class SavedPolicy(ABC):
    """A checkpoint's record and weights.

    Attributes:
        path: of the file or folder.
        meta: everything but weights and optimizer states.
        verified: its content was compared with the digest that was written with it.
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
        """Of most of the policy's weights."""
        return torch.float32

    @abstractmethod
    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of the policy's tensors, on the CPU.

        Raises:
            ConfigError: the files are damaged.
        """


def config_of(options: dict[str, Any], path: Path, *, trust_remote_code: bool) -> PolicyConfig:
    """A recorded policy's config for use outside of training, on whatever machine this is.

    Args:
        options: the record's ``policy``.
        path: of the checkpoint, for messages.
        trust_remote_code: never what a file says about running code.

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


def open_saved(path: Path) -> SavedPolicy:
    """Look at what is at ``path``.

    Raises:
        ConfigError: there is no checkpoint of ours, or it can't be read.
    """
    verified = refuse_damaged(path)
    saved: SavedPolicy
    if not path.is_dir():
        saved = _OneFile(path)
    elif (path / LISTING).is_file():
        saved = _Shards(path)
    else:
        saved = _Zero(path)
    saved.verified = verified
    return saved


def restored(saved: SavedPolicy, config: PolicyConfig, dtype: torch.dtype) -> Policy:
    """The policy with the checkpoint's weights in it; of an adapter's run the base model's are those of its files.

    Args:
        saved: the checkpoint.
        config: as :func:`config_of` gives it.
        dtype: of the base model of an adapter; other weights have the checkpoint's.

    Raises:
        ConfigError: the checkpoint is of another model, or its adapter of another base.
    """
    policy = config.build(dtype)
    state = policy.state_dict()
    _refuse_other_base(saved, config, policy)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad or of_adapter(name)}
    present = {state[name].data_ptr() for name in saved.names if name in state}
    tied = {n for n, v in state.items() if n in saved.names or v.data_ptr() not in present}
    wanted = trained if saved.adapts else tied
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
    """An adapter on a base model that it wasn't trained over is a model that nobody has seen."""
    then = saved.record.get("digests", {}).get("base")
    if then is None or saved.record["policy"].get("quantize") or "torch.float16" in then.split(":")[0].split(","):
        return  # not recorded, or in numbers that the base model's own dtype doesn't give again
    if not same_base(then, base_digest(policy)):
        raise ConfigError(
            f"the checkpoint's adapter was trained over another base model than what is now at {config.path}. "
            "Put back what the run began with."
        )


class _OneFile(SavedPolicy):
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
        return _most([value.dtype for value in self._state.values()])

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: self._state[name] for name in names}


class _Shards(SavedPolicy):
    """torch.distributed.checkpoint, as Lightning's ModelParallelStrategy writes it."""

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
        except Exception as error:  # broken files fail in whatever way their bytes happen to
            raise ConfigError(f"{path} can't be read as a sharded checkpoint: {short(error)}") from error
        lead = f"state_dict.{PREFIX}"
        entries = {k: v for k, v in metadata.state_dict_metadata.items() if k.startswith(lead) and hasattr(v, "size")}
        self._entries: dict[str, Any] = {key.removeprefix(lead): entry for key, entry in entries.items()}

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    @property
    def dtype(self) -> torch.dtype:
        return _most([entry.properties.dtype for entry in self._entries.values()])

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


class _Zero(SavedPolicy):
    """DeepSpeed, stages 1 to 3: its own tool puts the float32 weights together."""

    # what DeepSpeed pickles beside tensors and plain values
    classes = (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        try:
            from deepspeed.utils import zero_to_fp32
        except ImportError as error:
            raise ConfigError(
                f"{path} is a DeepSpeed checkpoint, which DeepSpeed itself must put together. Install it where you "
                "export (no GPU is needed): pip install deepspeed"
            ) from error
        self._tools = zero_to_fp32
        tag = (path / "latest").read_text(encoding="utf-8").strip()
        self._folder = path / tag
        if Path(tag).name != tag or not self._folder.is_dir():
            raise ConfigError(f"{path}: latest names the folder {tag!r}, which isn't there. Was the copy interrupted?")
        for file in sorted(self._folder.glob("*.pt")):
            self._refuse_code(file)
        models = sorted(self._folder.glob("*model_states.pt"))
        if not models:
            raise ConfigError(f"{self._folder}: no *_model_states.pt is there. Was the copy interrupted?")
        content = torch.load(models[0], map_location="cpu", weights_only=False, mmap=True)
        modules = content.pop("module", {})
        shapes = content.get("param_shapes") or []
        self._names = {name for group in shapes for name in group} | set(modules)
        self._names |= set(content.get("frozen_param_shapes") or {})
        super().__init__(path, {k: content[k] for k in content if k in ("rap_lightning", FACTS)})

    def _refuse_code(self, file: Path) -> None:
        """DeepSpeed's files are pickles that its tool runs: allow what DeepSpeed writes, and nothing else."""
        try:
            found = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(self.classes)
        except Exception as error:
            raise ConfigError(f"{file} can't be read: it is cut off, or of another kind.") from error
        if found:
            raise ConfigError(
                f"{file} holds more than DeepSpeed's own values and tensors, and is refused: {sorted(found)[0]}"
            )

    @property
    def names(self) -> Collection[str]:
        return {n.removeprefix(PREFIX) for n in self._names if n.startswith(PREFIX)}

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        wanted = {PREFIX + name for name in names}
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                state = self._tools.get_fp32_state_dict_from_zero_checkpoint(str(self.path), lazy_mode=True)
            return {n.removeprefix(PREFIX): state[n].contiguous() for n in wanted}
        except Exception as error:
            raise ConfigError(
                f"{self.path}: DeepSpeed can't put its weights together, a file is missing, cut off or damaged: "
                f"{short(error)}"
            ) from error


FACTS = "rap_lightning_facts"
"""Where a checkpoint keeps what a model card says of its run."""


def _most(dtypes: list[torch.dtype]) -> torch.dtype:
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return Counter(floating).most_common(1)[0][0] if floating else torch.float32
