"""What a run leaves beside its metrics, and how to go on with it."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from rap_lightning.callbacks.folders import run_folder
from rap_lightning.datamodule import PreferenceDataModule


class RunRecord(pl.Callback):
    """Writes ``data_report.json``: rows read, kept, dropped, repaired and truncated, with reasons."""

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of the data that are about to be trained on."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule):
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps([report.as_dict() for report in data.reports.values()], indent=2, ensure_ascii=False)
            (folder / "data_report.json").write_text(text + "\n", encoding="utf-8")


class ResumeHint(pl.Callback):
    """After an interrupted fit, says which checkpoint to go on from."""

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Print the newest checkpoint of this run, if it wrote one."""
        folder = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or run_folder(trainer) / "checkpoints")
        saved = [path for path in folder.glob("*.ckpt") if not path.is_symlink()] if folder.is_dir() else []
        if saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime)
            print(f"to go on, run the same command with: --ckpt_path {newest}", flush=True)
