"""Hosts that write a checkpoint together: whether they write it to one place.

Where each has a disk of its own, rank zero's folder names files that lie elsewhere, and nobody notices until the
checkpoint is needed.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from rap_lightning.errors import ConfigError, few

WITHIN = 10.0
"""Seconds after which a file that another host wrote must be seen: network file systems remember what wasn't there."""


def writes_shards(strategy: Any) -> bool:
    """Whether every rank writes a part of a checkpoint."""
    if isinstance(strategy, ModelParallelStrategy):
        return bool(strategy._save_distributed_checkpoint)
    return isinstance(strategy, DeepSpeedStrategy)


def refuse_apart(strategy: Any, folder: Path) -> None:
    """Raise ConfigError on every rank where one doesn't see what rank zero writes into a folder.

    Where rank zero can't write there, nothing is compared: saving itself says so.

    Args:
        strategy: its process group is up.
        folder: of the checkpoints; made if it isn't there.
    """
    name = f".seen-by-all-{uuid.uuid4().hex}"
    if strategy.is_global_zero:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError:
            name = ""
    name, first = strategy.broadcast((name, socket.gethostname()))
    if not name:
        return
    blind: list[Any] = ["" if _sees(folder / name) else f"rank {strategy.global_rank} on {socket.gethostname()}"]
    blind *= strategy.world_size
    torch.distributed.all_gather_object(blind, blind[0])
    if strategy.is_global_zero:
        with suppress(OSError):
            (folder / name).unlink()
    if found := [one for one in blind if one]:
        error = ConfigError(
            f"{few(found)} can't see what rank 0 on {first} writes to {folder.absolute()}. "
            "Each rank writes its part of a sharded checkpoint there, so it must be on one file system that all hosts "
            "share. Set --trainer.default_root_dir (or --checkpoint.dirpath) to such a folder, by the same path."
        )
        error.on_all_ranks, error.saves = True, False
        raise error


def _sees(path: Path) -> bool:
    """Whether a file is there, or comes to be seen in time."""
    deadline = time.monotonic() + WITHIN
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        for parent in reversed(path.absolute().parents):
            with suppress(OSError):
                os.scandir(parent).close()  # opening a folder has a network file system look at it anew
        time.sleep(0.2)
    return True
