"""Open a checkpoint of fit, whichever strategy wrote it."""

from __future__ import annotations

from pathlib import Path

from rap_lightning.models.checkpoint.read_checkpoint import refuse_damaged
from rap_lightning.models.checkpoint.saved_policy import OneFile, SavedPolicy, Shards
from rap_lightning.models.checkpoint.sharded_folder import INDEX
from rap_lightning.models.checkpoint.zero_folder import ZeroFolder


def open_saved(path: Path) -> SavedPolicy:
    """Verify a checkpoint and read its record.

    Raises:
        ConfigError: there is no checkpoint of rap-lightning, or it can't be read.
    """
    verified = refuse_damaged(path)
    saved: SavedPolicy
    if not path.is_dir():
        saved = OneFile(path)
    elif (path / INDEX).is_file():
        saved = Shards(path)
    else:
        saved = ZeroFolder(path)
    saved.verified = verified
    return saved
