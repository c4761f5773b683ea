"""Log-probabilities of response tokens on disk.

A folder holds what one model gives at one precision; inside it, a response is found by a digest of its own and its
prompt's token ids. So whatever changes the tokens (a template, a goal's text, a length, one character of a row) asks
for another entry, and what didn't change is used again.

Files are written whole under a name of their own and never changed: several processes and several runs can write at
once, and a process that is killed leaves everything up to its last file.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from rap_lightning.errors import ConfigError, DataError

FORMAT = "rap-lightning token log-probabilities 1"
SUFFIX = ".safetensors"
Values: TypeAlias = npt.NDArray[np.float32]


class LogpStore:
    """Log-probabilities of one model, by digest of prompt and response.

    Args:
        root: folder of all stores.
        key: everything beside the token ids that changes the numbers.

    Raises:
        ConfigError: the folder can't be written, or a file in it is damaged or not one of ours.
    """

    def __init__(self, root: Path, key: dict[str, str]) -> None:
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = root / self.key[:16]
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._open: dict[Path, Any] = {}
        self._new: dict[bytes, Values] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_whole(self.folder / "key.json", json.dumps(key, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise self._unwritable(error) from error
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places or digest in self._new

    def __getitem__(self, digest: bytes) -> Values:
        """[response tokens] float32 nats.

        Raises:
            KeyError: it isn't there.
        """
        if digest in self._new:
            return self._new[digest]
        path, start, stop = self._places[digest]
        values: Values = self._open[path].get_slice("values")[start:stop]
        return values

    def add(self, digest: bytes, values: Values) -> None:
        """Hold an entry until the next ``flush``."""
        self._new[digest] = np.ascontiguousarray(values, dtype=np.float32)

    def flush(self) -> None:
        """Write what was added as one file, whole or not at all.

        Raises:
            ConfigError: the disk is full, say.
        """
        if not self._new:
            return
        from safetensors.numpy import save

        tensors: dict[str, npt.NDArray[Any]] = {
            "digests": np.frombuffer(b"".join(self._new), np.uint8).reshape(len(self._new), -1),
            "lengths": np.array([len(v) for v in self._new.values()], np.int64),
            "values": np.concatenate(list(self._new.values())),
        }
        metadata = {"format": FORMAT, "key": self.key, "sha256": _checksum(tensors)}
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        try:
            self._write_whole(path, save(tensors, metadata))
        except OSError as error:
            raise self._unwritable(error) from error
        self._read(path)
        self._new.clear()

    def refresh(self) -> None:
        """Take up the files that others have written since.

        Raises:
            ConfigError: one is damaged or not one of ours.
        """
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path not in self._open:
                self._read(path)

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="numpy")
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("digests", "lengths", "values")}
        except (SafetensorError, OSError) as error:
            raise self._refused(path, f"it can't be read ({str(error).splitlines()[0]})") from error
        if metadata.get("format") != FORMAT or metadata.get("key") != self.key:
            raise self._refused(path, "it belongs to another model, another precision or another program")
        if metadata.get("sha256") != _checksum(tensors):
            raise self._refused(path, "its content has changed since it was written")
        stops = np.cumsum(tensors["lengths"])
        starts = stops - tensors["lengths"]
        for digest, start, stop in zip(tensors["digests"], starts.tolist(), stops.tolist(), strict=True):
            self._places[digest.tobytes()] = (path, start, stop)
        self._open[path] = file

    def _write_whole(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"reference log-probabilities can't be written to {self.folder}: {error.strerror or error}. What was "
            "written before is whole and will be used. Make room, or name another folder with "
            "--model.reference.folder."
        )

    def _refused(self, path: Path, why: str) -> ConfigError:
        return ConfigError(f"{path} is refused: {why}. Remove it; what it held is computed again.")


def _checksum(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def weights_digest(path: str, revision: str | None) -> str:
    """Digest of every file of a model that changes its numbers: weights, config, adapters.

    Raises:
        DataError: there are no weights in the safetensors format.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*config.json"]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=True))
    configs = ("config.json", "adapter_config.json")
    files = [path for path in sorted(folder.iterdir()) if path.suffix == SUFFIX or path.name in configs]
    if not any(p.suffix == SUFFIX for p in files):
        raise DataError(f"{path} has no *.safetensors, by which stored log-probabilities know their model.")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def default_root() -> Path:
    """Where stores are kept unless a folder is named: with the user's other caches."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rap-lightning" / "reference-logps"


def to_tensor(values: list[Values], device: torch.device) -> torch.Tensor:
    """[sum of lengths] float32 on ``device``."""
    return torch.from_numpy(np.concatenate(values)).to(device)
