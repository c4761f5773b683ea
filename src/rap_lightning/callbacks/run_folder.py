"""The folder of a run: which one it is, and how a run claims a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from rap_lightning.errors import ConfigError

ROOM = 1 << 16
"""Bytes that a run's folder must have room for: config, record and the first metrics."""


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of the run's logs, without communication between ranks.

    ``Trainer.log_dir`` is a broadcast: called by rank zero alone, or after one rank has failed, it never returns.
    """
    logger = trainer.logger
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir
    return Path(folder)


@contextmanager
def written_or_warned(path: Path) -> Iterator[None]:
    """Warn where the block can't write ``path``, and continue: a full disk must not end a run."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{path} was not written: {error.strerror or error}.")


class ClaimedFolder(pl.Callback):
    """Gives each run a folder ``version_N`` of its own, also where several are started at once.

    A CSVLogger or TensorBoardLogger without a version takes the number after the highest that exists and creates the
    folder later, so two runs can take the same one. Here rank zero takes the first number from there whose folder it
    can create (``os.mkdir`` fails if another run has just done so), and ``setup`` gives it to the other ranks.

    Lightning 2.6.6 has no public hook for the choice: ``_get_next_version`` and ``_version`` are private.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._loggers = [
            logger
            for logger in trainer.loggers
            if isinstance(logger, CSVLogger | TensorBoardLogger)
            and logger._version is None
            and "://" not in str(logger.root_dir)
        ]
        for logger in self._loggers:
            logger._get_next_version = _Claim(logger, trainer)  # type: ignore[method-assign]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the other ranks which folder rank zero has claimed."""
        for logger in self._loggers:
            logger._version = trainer.strategy.broadcast(logger.version if trainer.is_global_zero else None)


class _Claim:
    """Creates the folder of a logger's next version when the version is first asked for, in rank zero."""

    def __init__(self, logger: CSVLogger | TensorBoardLogger, trainer: pl.Trainer) -> None:
        self.root, self.next, self.trainer = Path(logger.root_dir), logger._get_next_version, trainer

    def __call__(self) -> int:
        version = self.next()
        while self.trainer.is_global_zero and not self._created(self.root / f"version_{version}"):
            version += 1
        return version

    def _created(self, folder: Path) -> bool:
        """Create the folder and a file in it; return False where another run has created the folder.

        Raises:
            ConfigError: nothing can be written there, so the run would train and leave nothing.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                os.mkdir(folder)
            except FileExistsError:
                return False
            with TemporaryFile(dir=folder) as file:
                file.write(b"0" * ROOM)
                file.flush()
            return True
        except OSError as error:
            raise ConfigError(
                f"the run's folder {folder} can't be written: {error.strerror}. Name another one with "
                "--trainer.default_root_dir (or the logger's save_dir), or make room there."
            ) from error
