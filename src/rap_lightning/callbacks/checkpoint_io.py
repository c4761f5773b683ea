"""Checkpoint files, written atomically and verified when they are read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.errors import ConfigError, NotSaved
from rap_lightning.models.checkpoint.integrity import partial_of, verify, write_sealed
from rap_lightning.models.checkpoint.read_checkpoint import refuse_unreadable
from rap_lightning.models.checkpoint.sharded_files import of_shards


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's own reading and writing, but for files here: all or nothing, with a digest.

    Lightning writes to the system's temporary folder first. Where that is another disk, the file is then copied to its
    final name, and a run that is killed meanwhile leaves half a checkpoint there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._holding = False
        self._problem: NotSaved | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; other places than this machine's disks are left to Lightning."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            self.size = write_sealed(checkpoint, Path(path))
        except OSError as error:
            problem = NotSaved(unwritable(Path(path), error))
            if not self._holding:
                raise problem from error
            self._problem = problem

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Verify, then read."""
        if _is_local_file_protocol(path):
            refuse_unreadable(Path(path))
            if Path(path).is_dir():  # a strategy that shards reads its own
                raise ConfigError(of_shards(Path(path)))
            if not verify(Path(path)):
                rank_zero_info(f"{path} has no digest of its content, so it is read without being verified.")
        return super().load_checkpoint(path, *args, **kwargs)

    @contextmanager
    def holding(self) -> Iterator[list[NotSaved]]:
        """Collect a failure instead of raising it: other ranks wait for this one at the end of saving."""
        found: list[NotSaved] = []
        self._holding, self._problem = True, None
        try:
            yield found
        finally:
            self._holding = False
            found += [self._problem] if self._problem else []


def unwritable(path: Path, error: OSError) -> str:
    """Why a checkpoint could not be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "Make room there, or write elsewhere with --checkpoint.dirpath"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"Let {os.environ.get('USER') or 'this user'} write to {path.parent}, or set --checkpoint.dirpath"
    else:
        what = "See to that disk, or write elsewhere with --checkpoint.dirpath"
    place = partial_of(path) if error.filename is None else error.filename
    return f"checkpoint {path} was not written: {error.strerror or error} ({place}). {what}."
