"""What a run leaves beside its metrics."""

from __future__ import annotations

import json

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
