"""A Hugging Face folder at the end of fit."""

from __future__ import annotations

import shutil

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.callbacks.folders import run_folder
from rap_lightning.models.export import export, full_state, merge
from rap_lightning.module import PreferenceModule


class ExportHF(pl.Callback):
    """Writes the trained policy to ``hf/`` in the run's folder when fit ends.

    Args:
        enabled: write at all.
        merge: with LoRA, also write ``hf-merged/``, the base model with the adapter added to its weights.
    """

    def __init__(self, enabled: bool = True, merge: bool = False) -> None:
        self.enabled, self.merge = enabled, merge

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the weights from all ranks; rank zero writes."""
        if not self.enabled or not isinstance(pl_module, PreferenceModule) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert pl_module.policy is not None, "fit builds the policy"
        state = full_state(pl_module.policy)
        if trainer.is_global_zero:
            run = run_folder(trainer)
            output, config = run / "hf", pl_module.policy_config
            shutil.rmtree(output, ignore_errors=True)  # of this run's own, when it was resumed
            export(pl_module.policy, state, pl_module.tokenizer, output, config)
            rank_zero_info(f"exported: {output}")
            if self.merge and pl_module.policy.has_adapter:
                merged = run / "hf-merged"
                shutil.rmtree(merged, ignore_errors=True)
                merge(output, merged, config, pl_module.tokenizer)
                rank_zero_info(f"exported, adapter merged: {merged}")
        trainer.strategy.barrier("export")
