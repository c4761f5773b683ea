"""Checkpoints of shards: a folder to which every rank wrote its part, and the list of what should be there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from rap_lightning.errors import ConfigError, join_some

LISTING = ".metadata"
"""What torch.distributed.checkpoint writes last, on rank zero: which tensor lies in which file."""
LATEST = "latest"
"""What DeepSpeed writes: the name of the folder with its files."""


def refuse_incomplete(folder: Path) -> None:
    """Raise ConfigError where a folder is no checkpoint of shards, or files that its own list names are missing."""
    if (folder / LATEST).is_file() and not (folder / LISTING).is_file():
        return  # DeepSpeed's keeps no list
    parts = sorted(folder.glob("*.distcp"))
    if not (folder / LISTING).is_file():
        raise ConfigError(
            f"{folder} is a folder, but no sharded checkpoint: it has neither {LISTING} (FSDP2) nor {LATEST} "
            f"(DeepSpeed). {_parts_only(parts)}".rstrip()
        )
    try:
        listed = PlainReader(folder).read_metadata().storage_data.values()
        names = {str(entry.relative_path) for entry in listed}
    except Exception as error:  # broken files fail in whatever way their bytes happen to
        raise ConfigError(f"{folder} can't be read as a sharded checkpoint: {short(error)}") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of its {len(names)} files of shards: {join_some(missing)}. Rank R writes "
            "__R_*.distcp: were they left on other hosts? All hosts of a run must write to one shared file system. "
            "Copy them here from the same folder there, or go on from another checkpoint."
        )


def of_shards(folder: Path) -> str:
    """Why one that isn't of FSDP2 or DeepSpeed can't go on from a folder, and what does."""
    by = "fsdp2" if (folder / LISTING).is_file() else "deepspeed-zero2"
    where = " (-c configs/strategy/cpu-fsdp2.yaml on CPUs)" if by == "fsdp2" else ""
    alone = " One process can do it too: --trainer.devices 1 after the overlay." if by == "fsdp2" else ""
    return (
        f"{folder} is a checkpoint of shards, which this run's strategy doesn't read. Add -c configs/strategy/{by}.yaml"
        f"{where}.{alone} export reads it as it is, without an overlay."
    )


def _parts_only(parts: list[Path]) -> str:
    if not parts:
        return ""
    return (
        f"It has {len(parts)} files of shards ({parts[0].name}, ...), but not rank zero's list of them: did each host "
        "write to a disk of its own? All hosts of a run must write to one shared file system."
    )


def short(error: BaseException) -> str:
    """A library's error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


class PlainReader(FileSystemReader):
    """torch's reader, but its metadata, a pickle, may hold plain records of torch.distributed.checkpoint only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """The list of tensors and files."""
        from torch.distributed.checkpoint.metadata import StorageMeta

        with open(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _PlainUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
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
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint's metadata never does")
