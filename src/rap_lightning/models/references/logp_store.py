"""Log-probabilities of response tokens on disk.

A folder holds what one model computes at one precision; inside it, a response is found by a digest of its own and its
prompt's token ids. So every change of the tokens (a template, a goal's text, a length, one character of a row) makes
another entry, and what didn't change is used again.

Files are written whole under unique names and never changed: several processes and several runs can write at once, and
a process that is killed loses only what it had not written yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rap_lightning.atomic_write import atomic_file
from rap_lightning.errors import ConfigError, first_line

FORMAT = "rap-lightning token log-probabilities 1"
SUFFIX = ".safetensors"
FLUSH_SECONDS = 30.0
"""At most this much work is lost when a process is killed."""
Values: TypeAlias = npt.NDArray[np.float32]


class LogpStore:
    """Log-probabilities of one model, by digest of prompt and response.

    Args:
        root: folder of all stores.
        key: everything beside the token ids that changes the numbers.

    Raises:
        ConfigError: the folder can't be written, or a file in it is damaged or not of this store.
    """

    def __init__(self, root: Path, key: dict[str, str]) -> None:
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = root / self.key[:16]
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._open: dict[Path, Any] = {}
        self._new: dict[bytes, Values] = {}
        self._flushed = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / "key.json") as file:
                json.dump(key, file, indent=1, sort_keys=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._new)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places or digest in self._new

    def __getitem__(self, digest: bytes) -> Values:
        """Return [response tokens] float32 nats.

        Raises:
            KeyError: there is no such entry.
        """
        if digest in self._new:
            return self._new[digest]
        path, start, stop = self._places[digest]
        values: Values = self._open[path].get_slice("values")[start:stop]
        return values

    def add(self, digest: bytes, values: Values) -> None:
        """Keep an entry in memory until the next ``flush``."""
        self._new[digest] = np.ascontiguousarray(values, dtype=np.float32)

    def flush_if_due(self) -> None:
        """Flush where the last time is longer ago than FLUSH_SECONDS."""
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one file, whole or not at all.

        Raises:
            ConfigError: it can't be written: for example, the disk is full.
        """
        self._flushed = time.monotonic()
        if not self._new:
            return
        from safetensors.numpy import save

        tensors: dict[str, npt.NDArray[Any]] = {
            "digests": np.frombuffer(b"".join(self._new), np.uint8).reshape(len(self._new), -1),
            "lengths": np.array([len(v) for v in self._new.values()], np.int64),
            "values": np.concatenate(list(self._new.values())),
        }
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        try:
            with atomic_file(path, "wb") as file:
                file.write(save(tensors, {"format": FORMAT, "key": self.key, "sha256": _checksum(tensors)}))
        except OSError as error:
            raise self._unwritable(error) from error
        self._read(path)
        self._new.clear()

    def refresh(self) -> None:
        """Read the files that other processes have written since.

        Raises:
            ConfigError: one is damaged or not of this store.
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
            raise _refused(path, f"it can't be read ({first_line(error)})") from error
        if metadata.get("format") != FORMAT or metadata.get("key") != self.key:
            raise _refused(path, "it belongs to another model, another precision or another program")
        if metadata.get("sha256") != _checksum(tensors):
            raise _refused(path, "its content has changed since it was written")
        stops = np.cumsum(tensors["lengths"])
        starts = stops - tensors["lengths"]
        for digest, start, stop in zip(tensors["digests"], starts.tolist(), stops.tolist(), strict=True):
            self._places[digest.tobytes()] = (path, start, stop)
        self._open[path] = file

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"reference log-probabilities can't be written to {self.folder}: {error.strerror or error}. What was "
            "written before is whole and will be used. Make room, or name another folder with "
            "--model.reference.folder."
        )


def default_root() -> Path:
    """Return the folder of all stores unless one is named: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rap-lightning" / "reference-logps"


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is refused: {why}. Remove it; its content is then computed again.")


def _checksum(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
