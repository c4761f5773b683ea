"""Reading checkpoints: plain values and tensors only, never pickled code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from rap_lightning.errors import ConfigError


def refuse_unreadable(path: Path) -> None:
    """Raise ConfigError where no checkpoint can be at ``path``: nothing there, or a file that is cut off or foreign.

    A sharded checkpoint is a folder; its own reader looks into it.
    """
    if path.is_dir():
        return
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Expected a .ckpt file that fit wrote.")
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} can't be read as a checkpoint: it is cut off, or of another kind.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file that fit wrote; its tensors stay on disk until they are looked at.

    Raises:
        ConfigError: it isn't there, can't be read, or isn't one of ours.
    """
    refuse_unreadable(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign or broken file fails in whatever way its bytes happen to
        raise ConfigError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from error
    if not isinstance(saved, dict) or "rap_lightning" not in saved:
        raise ConfigError(f"{path} is not a checkpoint of rap-lightning.")
    return saved
