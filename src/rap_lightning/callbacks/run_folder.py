"""The folder of a run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of the run's logs, without communication between ranks.

    ``Trainer.log_dir`` is a broadcast: called by rank zero alone, or after one rank has failed, it never returns.
    """
    logger = trainer.logger
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir
    return Path(folder)
