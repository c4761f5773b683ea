"""Write the output of ``predict`` as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.atomic_write import atomic_file


class WritePredictions(BasePredictionWriter):
    """Writes ``predictions.jsonl`` in the run's folder: messages, goal and response, one line per response.

    With several devices each writes its own part, ``predictions-RANK.jsonl``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write all predictions; the file appears when it is complete."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        with atomic_file(folder / name) as file:
            for batch in predictions:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in batch)
        rank_zero_info(f"wrote {folder / name}")
