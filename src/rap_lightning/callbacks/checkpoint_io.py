"""Reading and writing checkpoint files: whole or not at all, and compared with their checksums."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from rap_lightning.errors import ConfigError, NotSaved
from rap_lightning.models.checkpoint.integrity import partial_of, verify, write_whole
from rap_lightning.models.checkpoint.read_checkpoint import refuse_unreadable
from rap_lightning.models.checkpoint.sharded_folder import needs_sharding_strategy


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's CheckpointIO, with local files written whole or not at all and verified before they are read.

    Lightning writes to the system's temporary folder first. Where that is on another disk, the file is then copied to
    its final name, and a run that is killed meanwhile leaves half a checkpoint there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._collected: list[NotSaved] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a local file; URLs are left to Lightning."""
        if storage_options is not None or _is_url(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_whole(checkpoint, Path(path))
        except OSError as error:
            problem = NotSaved(unwritable(Path(path), error))
            if self._collected is None:
                raise problem from error
            self._collected.append(problem)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify a local file, then read it; code in it is run only with ``weights_only=False``, wherever it is."""
        if not _is_url(path):
            refuse_unreadable(Path(path))
            if Path(path).is_dir():  # strategies that shard have a reader of their own
                raise ConfigError(needs_sharding_strategy(Path(path)))
            if not verify(Path(path)):
                rank_zero_warn(f"{path} has no checksums, so it is loaded without being verified.")
        return super().load_checkpoint(path, map_location, weights_only is not False)

    @contextmanager
    def collecting_failures(self) -> Iterator[list[NotSaved]]:
        """Collect failures to write instead of raising them: only rank zero writes, and other ranks wait for it."""
        found: list[NotSaved] = []
        self._collected = found
        try:
            yield found
        finally:
            self._collected = None


def _is_url(path: Any) -> bool:
    return "://" in str(path)


def unwritable(path: Path, error: OSError) -> str:
    """Return why a checkpoint could not be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "Make room there, or write elsewhere with --checkpoint.dirpath"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"Let {os.environ.get('USER') or 'this user'} write to {path.parent}, or set --checkpoint.dirpath"
    else:
        what = "Check that disk, or write elsewhere with --checkpoint.dirpath"
    place = partial_of(path) if error.filename is None else error.filename
    return f"checkpoint {path} was not written: {error.strerror or error} ({place}). {what}."
