"""A Hugging Face folder at the end of fit."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rap_lightning.callbacks.run_folder import run_folder
from rap_lightning.callbacks.run_metadata import run_facts
from rap_lightning.callbacks.run_tracking import log_folder
from rap_lightning.callbacks.trackers import takes_folders
from rap_lightning.errors import ConfigError
from rap_lightning.models.goal_chat_template import with_goals_in_template
from rap_lightning.models.hf_export import ExportOptions, export, full_state, merge
from rap_lightning.models.model_card import model_card
from rap_lightning.models.policy import Policy
from rap_lightning.models.strength_record import at_best, merged_record
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.goals import is_written


class ExportHF(pl.Callback):
    """Writes the trained policy, in the dtype it was trained in, to ``hf/`` in the run's folder when fit ends.

    Args:
        enabled: write at all.
        merge: with LoRA, also write ``hf-merged/``, the base model with the adapter added to its weights in float32.
        goal_in_template: write the best goal into the chat template, so that a plain chat asks for it.
        track: also send the folders to the run's trackers (--track), as artifacts.
    """

    def __init__(
        self, enabled: bool = True, merge: bool = False, goal_in_template: bool = True, track: bool = False
    ) -> None:
        self.enabled, self.merge, self.goal_in_template, self.track = enabled, merge, goal_in_template, track

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise ConfigError for options without effect."""
        for name, off in (
            ("merge", not self.merge), ("goal_in_template", self.goal_in_template), ("track", not self.track)
        ):  # fmt: skip
            if not off and not self.enabled:
                raise ConfigError(f"--export.{name} has no effect with --export.enabled false; remove one of the two.")
        if self.merge and isinstance(pl_module, PreferenceModule) and not pl_module.policy_config.adapts:
            raise ConfigError("--export.merge has no effect without an adapter: set --model.policy.lora.r")
        if self.track and stage == "fit" and trainer.is_global_zero and not takes_folders(trainer.loggers):
            raise ConfigError(
                "--export.track has no effect without a tracker that stores files: add --track wandb, mlflow or comet"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a goal that can't be written into the chat template now, not after days of training."""
        if self._writes(trainer) and isinstance(pl_module, PreferenceModule):
            goal = pl_module.goal_record()
            if is_written(goal) and self.goal_in_template:
                with_goals_in_template(pl_module.tokenizer, goal)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the weights from all ranks; rank zero writes."""
        if not (self._writes(trainer) and isinstance(pl_module, PreferenceModule)):
            return
        assert pl_module.policy is not None, "fit builds the policy"
        state = full_state(pl_module.policy)
        problem: Exception | None = None
        if trainer.is_global_zero:
            try:
                facts = run_facts(trainer, pl_module)
                for folder in self._write(run_folder(trainer), pl_module, pl_module.policy, state, facts):
                    if self.track:
                        log_folder(trainer, folder)
            except Exception as error:  # raised after the other ranks know: they would wait forever
                problem = error
        if trainer.strategy.broadcast(problem is not None):
            raise problem or RuntimeError("export failed on rank zero")

    def _writes(self, trainer: pl.Trainer) -> bool:
        return self.enabled and not getattr(trainer, "fast_dev_run", False)

    def _write(
        self, run: Path, module: PreferenceModule, policy: Policy, state: dict[str, Tensor], facts: dict[str, Any]
    ) -> list[Path]:
        """Write the folders and return them."""
        config, (goal, strength) = module.policy_config, at_best(module.goal_record())

        def options(output: Path, adapter: bool) -> ExportOptions:
            record = goal if adapter else merged_record(goal)
            factor = strength if adapter else 1.0  # what is merged is the adapter that was written
            card = model_card(
                facts | {"goal": record}, adapter=adapter, goal_in_template=self.goal_in_template, name=output.name,
                title=output.resolve().parent.name,  # the run's name says more than "hf"
            )  # fmt: skip
            return ExportOptions(goal=record, strength=factor, goal_in_template=self.goal_in_template, card=card)

        output = _free(run / "hf")
        export(policy, state, module.tokenizer, output, config, options(output, policy.has_adapter))
        rank_zero_info(f"exported: {output}")
        written = [output]
        if self.merge:
            from peft import PeftModel

            def load() -> Any:
                return PeftModel.from_pretrained(config.load_model(torch.float32), str(output))

            merged = _free(run / "hf-merged")
            checked = merge(load, module.tokenizer, merged, config, options(merged, adapter=False))
            rank_zero_info(f"exported, adapter merged: {merged} ({checked})")
            written.append(merged)
        return written


def _free(folder: Path) -> Path:
    """Return ``folder``, or the first of folder-2, folder-3, ... that doesn't exist: nothing is overwritten."""
    names = chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in count(2)))
    return next(name for name in names if not name.exists())
