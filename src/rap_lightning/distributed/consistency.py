"""What must be equal on all ranks of a run: the config, the packages, the model's files, the checkpoint folder."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
import uuid
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rap_lightning.distributed.gather import gathered
from rap_lightning.errors import ConfigError, join_some
from rap_lightning.provenance import flatten, masked

PACKAGES = ("rap-lightning", "torch", "transformers", "peft", "lightning")
PATHS = ("config", "trainer.default_root_dir", "model.policy.path", "data.source", "model.reference.folder")
"""Options that may differ between nodes, because they say where files are; what the files hold is compared itself."""
VISIBLE_WITHIN = 10.0
"""Seconds until another host's file must be visible: network file systems cache the absence of a file."""


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what is computed."""
    return {f"version of {name}": metadata.version(name) for name in PACKAGES}


def device_name(local_rank: int) -> str:
    """Return the product name of the GPU that a rank of this node computes on, or "no GPU"."""
    count = torch.cuda.device_count()
    return str(torch.cuda.get_device_name(local_rank % count)) if count else "no GPU"


def model_files(path: str) -> dict[str, str]:
    """Digests of a local model's config and of its weight files' sizes; empty for a Hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return {}
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    config = (folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b""
    return {
        "model config": hashlib.sha256(config).hexdigest()[:12],
        "model files": hashlib.sha256(str(sizes).encode()).hexdigest()[:12],
    }


def without_address(value: Any) -> str:
    """Return an option as text; a default function's would differ from process to process by its address."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def comparable(options: dict[str, Any]) -> dict[str, str]:
    """Nested options as short texts by dotted name (``model.loss.beta``), without secrets and those that may differ."""
    return {
        name: without_address(value)
        for name, value in flatten(masked(options)).items()
        if not f"{name}.".startswith(tuple(f"{path}." for path in PATHS))
    }


def difference(mine: dict[str, str], first: dict[str, str]) -> str:
    """The first difference from rank 0's facts, and how many more there are; empty where there is none.

    >>> difference({"data.max_length": "512"}, {"data.max_length": "1024"})
    'data.max_length (512 vs 1024)'
    """
    names = [name for name in sorted({*first, *mine}) if first.get(name) != mine.get(name)]
    return join_some([f"{name} ({mine.get(name)} vs {first.get(name)})" for name in names], 1)


def require_shared_folder(folder: Path) -> None:
    """Raise ConfigError on every rank where one does not see what rank 0 writes into a folder. A collective.

    Each rank writes its part of a sharded checkpoint there: on separate disks no checkpoint would be complete, and
    nobody would notice before it is needed. Where rank 0 cannot write, nothing is compared: saving reports that.
    """
    first = torch.distributed.get_rank() == 0
    probe = folder / f".seen-by-all-{uuid.uuid4().hex}" if first else None
    if probe is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError:
            probe = None
    host = socket.gethostname()
    name, first_host = gathered((probe.name if probe is not None else "", host))[0]
    if not name:
        return
    blind = gathered("" if _becomes_visible(folder / name) else host)
    if probe is not None:
        with suppress(OSError):
            probe.unlink()
    if missing := [f"rank {rank} ({host})" for rank, host in enumerate(blind) if host]:
        error = ConfigError(
            f"{join_some(missing)} cannot see what rank 0 ({first_host}) writes to {folder.absolute()}. Each rank "
            "writes its part of a sharded checkpoint there, so all hosts must share it on one file system. Set "
            "--trainer.default_root_dir (or --checkpoint.dirpath) to such a folder, by the same path."
        )
        error.on_all_ranks, error.saves = True, False
        raise error


def _becomes_visible(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        for parent in reversed(path.absolute().parents):
            with suppress(OSError):
                os.scandir(parent).close()  # opening a folder makes a network file system read it again
        time.sleep(0.2)
    return True
