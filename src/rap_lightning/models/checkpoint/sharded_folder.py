"""Sharded checkpoints: a folder to which every rank writes its part, and the index of what belongs there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from rap_lightning.errors import ConfigError, join_some

INDEX = ".metadata"
"""What torch.distributed.checkpoint writes last, on rank zero: which tensor is in which file."""
LATEST = "latest"
"""What DeepSpeed writes: the name of the subfolder with its files."""


def refuse_incomplete(folder: Path) -> None:
    """Raise ConfigError where a folder is not a sharded checkpoint, or lacks files that its own index names."""
    if (folder / LATEST).is_file() and not (folder / INDEX).is_file():
        return  # DeepSpeed writes no index
    parts = sorted(folder.glob("*.distcp"))
    if not (folder / INDEX).is_file():
        found = ""
        if parts:
            found = (
                f" It has {len(parts)} files of shards ({parts[0].name}, ...), but not rank zero's index: was saving "
                "interrupted, or did each host write to a disk of its own? All hosts must write to one shared file "
                "system."
            )
        raise ConfigError(f"{folder} is not a sharded checkpoint: no {INDEX} (FSDP2) or {LATEST} (DeepSpeed).{found}")
    try:
        names = {str(entry.relative_path) for entry in read_index(folder).storage_data.values()}
    except Exception as error:  # broken files fail in whatever way their bytes happen to
        raise ConfigError(f"{folder} can't be read as a sharded checkpoint: {short(error)}") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of its {len(names)} files of shards: {join_some(missing)}. Rank R writes "
            "__R_*.distcp: are they on other hosts? All hosts of a run must write to one shared file system. "
            "Copy them here from the same folder there, or resume from another checkpoint."
        )


def needs_sharding_strategy(folder: Path) -> str:
    """Return the message for a strategy that can't resume from a sharded checkpoint: which one can."""
    by = "fsdp2" if (folder / INDEX).is_file() else "deepspeed-zero2"
    where = " (-c configs/strategy/cpu-fsdp2.yaml on CPUs)" if by == "fsdp2" else ""
    alone = " One process can do it too: --trainer.devices 1 after the overlay." if by == "fsdp2" else ""
    return (
        f"{folder} is a sharded checkpoint, which this run's strategy doesn't read. Add -c configs/strategy/{by}.yaml"
        f"{where}.{alone} The export command reads it as it is, without an overlay."
    )


def short(error: BaseException) -> str:
    """Return a library's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def read_index(folder: Path) -> Metadata:
    """Unpickle a folder's index, refusing everything but plain records of torch.distributed.checkpoint."""
    with (folder / INDEX).open("rb") as file:
        metadata: Metadata = _PlainUnpickler(file).load()
    return metadata


class PlainReader(FileSystemReader):
    """torch's reader, with :func:`read_index` in the place of a bare ``pickle.load``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of tensors and files."""
        metadata = read_index(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    records = (
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING", "Metadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_StorageInfo",
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        ours = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        paths = module.startswith("pathlib") and name in ("PosixPath", "WindowsPath", "PurePosixPath")
        plain = paths or (module, name) in (("torch", "Size"), ("collections", "OrderedDict"))
        kinds = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        places = module == "torch.serialization" and name == "_get_layout"
        if plain or kinds or places or (ours and name in self.records):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint's index never does")
