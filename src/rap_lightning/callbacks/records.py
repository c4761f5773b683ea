"""What a run leaves beside its metrics."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from rap_lightning.callbacks.folders import run_folder
from rap_lightning.datamodule import PreferenceDataModule


class RunRecord(pl.Callback):
    """Writes ``data_report.json`` (rows read, kept, dropped, repaired and truncated, with reasons) and ``goal.json``
    (the goal template, with the numbers its scale was fitted to).
    """

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of the data that are about to be trained on."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule):
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            reports = [report.as_dict() for parts in data.reports.values() for report in parts]
            (folder / "data_report.json").write_text(_json(reports), encoding="utf-8")
            if data.goal is not None:
                (folder / "goal.json").write_text(_json(data.goal.record()), encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
