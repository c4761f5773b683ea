"""Checkpoints that say how to go on from them."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint; when a run is interrupted it prints, after saving, what to go on from."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save if so configured, then point to the newest checkpoint.

        Ranks save together: where one fails alone, the others are elsewhere, and the last checkpoint has to do.
        """
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt):
            super().on_exception(trainer, pl_module, exception)
        self._print_newest()

    @rank_zero_only
    def _print_newest(self) -> None:
        folder = Path(self.dirpath) if self.dirpath else None
        saved = [path for path in folder.glob("*.ckpt") if not path.is_symlink()] if folder else []
        if saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime)
            print(f"to go on, run the same command with: --ckpt_path {newest}", flush=True)
