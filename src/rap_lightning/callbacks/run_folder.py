"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run's logs, as rank zero knows it.

    ``Trainer.log_dir`` asks all ranks at once: called by rank zero alone, or while one rank fails, it never returns.
    """
    logger = trainer.logger
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir
    return Path(folder)
