"""Sharded checkpoints: a folder to which every rank writes its part, and the index of what belongs there.

Such a folder has pickles in three places: the index, the values beside tensors (a param group's learning rate), and
every file of DeepSpeed. torch and DeepSpeed unpickle them as they are, and a pickle can run any code. So
:func:`refuse_incomplete`, which every command calls before anything is loaded, refuses those with code.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, load  # type: ignore[attr-defined]
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from rap_lightning.errors import ConfigError, join_some

INDEX = ".metadata"
"""What torch.distributed.checkpoint writes last, on rank zero: which tensor is in which file."""
META = "meta.pt"
"""What Lightning writes beside the shards: everything but weights and optimizer state."""
LATEST = "latest"
"""What DeepSpeed writes: the name of the subfolder with its files."""
DEEPSPEED_PICKLES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
}  # fmt: skip
"""What DeepSpeed pickles beside tensors and plain values."""


def refuse_incomplete(folder: Path) -> None:
    """Refuse a folder that can't be read as a sharded checkpoint, and one whose pickles hold code.

    Raises:
        ConfigError: it is not a sharded checkpoint, lacks files that its own index names, or holds code.
    """
    if (folder / LATEST).is_file():
        for file in sorted(deepspeed_folder(folder).glob("*.pt")):
            _refuse_code(file, file, DEEPSPEED_PICKLES)
        if not (folder / INDEX).is_file():
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
        index = read_index(folder)
        names = {str(entry.relative_path) for entry in index.storage_data.values()}
        kinds = index.state_dict_metadata
        pickled = [
            entry for key, entry in index.storage_data.items()
            if not isinstance(kinds.get(key.fqn), TensorStorageMetadata)
        ]  # fmt: skip
    except CodeFound:
        raise
    except Exception as error:  # broken files fail with any type of error
        raise ConfigError(f"{folder} can't be read as a sharded checkpoint: {short(error)}") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of its {len(names)} files of shards: {join_some(missing)}. Rank R writes "
            "__R_*.distcp: are they on other hosts? All hosts of a run must write to one shared file system. "
            "Copy them here from the same folder there, or resume from another checkpoint."
        )
    for entry in pickled:
        _refuse_code(io.BytesIO(read_entry(folder, entry)), folder / str(entry.relative_path))


def read_entry(folder: Path, entry: Any) -> bytes:
    """Return the bytes of one entry of the index."""
    with (folder / str(entry.relative_path)).open("rb") as file:
        file.seek(int(entry.offset))
        return file.read(int(entry.length))


def deepspeed_folder(folder: Path) -> Path:
    """Return the subfolder with DeepSpeed's files.

    Raises:
        ConfigError: it isn't there, or is outside of the checkpoint.
    """
    tag = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if tag in ("", ".", "..") or Path(tag).name != tag or not (folder / tag).is_dir():
        raise ConfigError(f"{folder}: {LATEST} names the folder {tag!r}, which isn't there. Was the copy interrupted?")
    return folder / tag


class CodeFound(ConfigError):
    """A pickle of a checkpoint names more than tensors and plain values: unpickling it would run that."""

    def __init__(self, file: Path, found: str) -> None:
        super().__init__(
            f"{file} is refused: it holds {found}, and unpickling it would run that. fit writes only tensors and plain "
            "values. Resume from another checkpoint, and don't trust where this one came from."
        )


def _refuse_code(content: IO[bytes] | Path, file: Path, allowed: Collection[str] = ()) -> None:
    """Raise ConfigError for an archive of ``torch.save`` whose pickle names more than torch's plain types."""
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(content)) - set(allowed)
    except Exception as error:
        raise ConfigError(
            f"{file} can't be read: it is cut off, or of another kind than what fit writes (for example, a pickle)."
        ) from error
    if found:
        raise CodeFound(file, sorted(found)[0])


def load_plain(state: dict[str, Any], folder: Path) -> None:
    """Fill ``state`` from a folder of shards, as ``torch.distributed.checkpoint.load`` does, but without running code.

    All ranks must call it.
    """
    load(state, storage_reader=PlainReader(folder), planner=_PlainPlanner())


class _PlainPlanner(DefaultLoadPlanner):
    """torch's planner, which unpickles what is not a tensor with ``weights_only=False`` (torch 2.13)."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place, after making sure that it is plain."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


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
        try:
            metadata: Metadata = _PlainUnpickler(file).load()
        except _OtherGlobal as error:
            raise CodeFound(folder / INDEX, str(error)) from error
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
        raise _OtherGlobal(f"{module}.{name}")


class _OtherGlobal(pickle.UnpicklingError):
    """An index names something that is no record of torch.distributed.checkpoint."""
