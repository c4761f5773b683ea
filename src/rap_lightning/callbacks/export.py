"""A Hugging Face folder at the end of fit."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rap_lightning.callbacks.folders import run_folder
from rap_lightning.errors import ConfigError
from rap_lightning.models.export import export, full_state, merge
from rap_lightning.module import PreferenceModule


class ExportHF(pl.Callback):
    """Writes the trained policy, in the dtype it was trained in, to ``hf/`` in the run's folder when fit ends.

    Args:
        enabled: write at all.
        merge: with LoRA, also write ``hf-merged/``, the base model with the adapter added to its weights in float32.
    """

    def __init__(self, enabled: bool = True, merge: bool = False) -> None:
        self.enabled, self.merge = enabled, merge

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what would have no effect."""
        if self.merge and not self.enabled:
            raise ConfigError("--export.merge has no effect with --export.enabled false; remove one of the two.")
        if self.merge and isinstance(pl_module, PreferenceModule) and not pl_module.policy_config.adapts:
            raise ConfigError("--export.merge has no effect without an adapter: set --model.policy.lora.r")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the weights from all ranks; rank zero writes."""
        fast_dev_run = getattr(trainer, "fast_dev_run", False)
        if not self.enabled or not isinstance(pl_module, PreferenceModule) or fast_dev_run:
            return
        assert pl_module.policy is not None, "fit builds the policy"
        state = full_state(pl_module.policy)
        problem: Exception | None = None
        if trainer.is_global_zero:
            try:
                self._write(run_folder(trainer), pl_module, state)
            except Exception as error:  # told to the other ranks first, which would wait for ever
                problem = error
        if trainer.strategy.broadcast(problem is not None):
            raise problem or RuntimeError("export failed on rank zero")

    def _write(self, run: Path, module: PreferenceModule, state: dict[str, Tensor]) -> None:
        assert module.policy is not None, "fit builds the policy"
        output = _free(run / "hf")
        export(module.policy, state, module.tokenizer, output, module.policy_config, module.goal_record())
        rank_zero_info(f"exported: {output}")
        if self.merge:
            merged = _free(run / "hf-merged")
            merge(output, merged, module.policy_config, module.tokenizer, module.goal_record())
            rank_zero_info(f"exported, adapter merged: {merged}")


def _free(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that isn't there: nothing is ever overwritten."""
    names = chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())
