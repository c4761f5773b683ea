"""The policy in a checkpoint of DeepSpeed ZeRO, stages 1 to 3, whose own tool joins the float32 weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.saved_policy import FACTS, PREFIX, SavedPolicy
from rap_lightning.models.checkpoint.sharded_folder import deepspeed_folder, refuse_incomplete, short


class ZeroFolder(SavedPolicy):
    """What Lightning's DeepSpeedStrategy writes."""

    def __init__(self, path: Path) -> None:
        try:
            from deepspeed.utils import zero_to_fp32
        except ImportError as error:
            raise ConfigError(
                f"{path} is a DeepSpeed checkpoint, which DeepSpeed itself must read. Install it where you export (no "
                "GPU is needed): pip install deepspeed"
            ) from error
        self._tools = zero_to_fp32
        refuse_incomplete(path)  # DeepSpeed's tool would run code in its files
        folder = deepspeed_folder(path)
        models = sorted(folder.glob("*model_states.pt"))
        if not models:
            raise ConfigError(f"{folder}: no *_model_states.pt is there. Was the copy interrupted?")
        content = torch.load(models[0], map_location="cpu", weights_only=False, mmap=True)
        names = {name for group in content.get("param_shapes") or [] for name in group}
        names |= {*content.pop("module", {}), *(content.get("frozen_param_shapes") or {})}
        self._names = {n.removeprefix(PREFIX) for n in names if n.startswith(PREFIX)}
        super().__init__(path, {k: content[k] for k in content if k in ("rap_lightning", FACTS)})

    @property
    def names(self) -> Collection[str]:
        return self._names

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                state = self._tools.get_fp32_state_dict_from_zero_checkpoint(str(self.path), lazy_mode=True)
            return {name: state[PREFIX + name].contiguous() for name in names}
        except Exception as error:
            raise ConfigError(
                f"{self.path}: DeepSpeed can't join its weights, a file is missing, cut off or damaged: {short(error)}"
            ) from error
