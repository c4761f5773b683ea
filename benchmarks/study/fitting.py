"""One training run with the package's own classes: data module, module, Lightning's trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from benchmarks.study.settings import MAX_LENGTH
from torch import Tensor

from rap_lightning.batches.types import Batch
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.training.warm_up import WarmUp


@dataclass
class Recipe:
    """What is trained on what, beside the world.

    Attributes:
        source: the file of pairs.
        loss: the loss.
        lr: peak learning rate.
        steps: optimizer steps.
        goal: the template; None trains on plain pairs.
        data: further options of PreferenceDataModule.
        warm_up: SFT before the loss.
    """

    source: Path
    loss: PreferenceLoss
    lr: float
    steps: int
    goal: GoalTemplate | None = None
    data: dict[str, Any] = field(default_factory=dict)
    warm_up: WarmUp | None = None


class Remembered(Frozen):
    """Frozen, whose numbers are kept for all runs of this process over the same base.

    Runs of one world ask for the same responses under the same prompts; a batch that is known whole costs nothing.
    Token ids are what they are found by, so another goal text or another truncation is another number.
    """

    _known: ClassVar[dict[str, dict[bytes, float]]] = {}  # base model -> digest of a response with its prompt -> nats

    def load(self, policy: PolicyConfig, dtype: torch.dtype) -> None:
        """As Frozen's."""
        super().load(policy, dtype)
        self._mine = self._known.setdefault(policy.path, {})

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        """[2B] float32 nats."""
        mine = self._mine
        if not all(digest in mine for digest in batch.digests):
            mine.update(zip(batch.digests, super().logps(policy, batch).tolist(), strict=True))
        return torch.tensor([mine[digest] for digest in batch.digests])


def fit(base: Path, recipe: Recipe, batch: int, seed: int) -> tuple[Policy, dict[str, Any]]:
    """The trained policy, and what the run saw: pairs in the data, steps, the last logged figures."""
    data = PreferenceDataModule(
        str(recipe.source), goal=recipe.goal, max_length=MAX_LENGTH, layout="tree", batch_size=batch, seed=seed,
        **recipe.data,
    )  # fmt: skip
    remembers = "reference" in recipe.loss.requires and "tokens" not in recipe.loss.requires and recipe.warm_up is None
    module = PreferenceModule(
        PolicyConfig(str(base)), recipe.loss, reference=Remembered() if remembers else None,
        optimizer=partial(torch.optim.AdamW, lr=recipe.lr, weight_decay=0.0, fused=True), warm_up=recipe.warm_up,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=recipe.steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        log_every_n_steps=max(1, recipe.steps // 5),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert module.policy is not None, "fit builds the policy"
    assert trainer.global_step == recipe.steps, f"{trainer.global_step} steps instead of {recipe.steps}"
    report = data.reports["train"][0]
    last = module.step_logger.last.values
    seen = {
        "pairs": report.pairs,
        "training_pairs": report.relabelled,
        "cut": sum(tally.count for tally in report.truncated.values()),
    }
    return module.policy, seen | {
        name: round(float(last[name]), 4) for name in ("loss", "rewards/accuracies", "rewards/margins") if name in last
    }


def implicit_rewards(policy: Policy, base: Policy, tokenizer: Any, pairs: list[dict[str, Any]]) -> list[float]:
    """Log-ratio of policy and base, in nats, without a goal, of all responses: chosen, rejected, chosen..."""
    from benchmarks.study.measuring import Asker, logps

    asker = Asker(tokenizer, None)
    asked = [(asker.ids(pair["prompt"], None), asker.response(pair, side)) for pair in pairs for side in SIDES]
    return [mine - theirs for mine, theirs in zip(logps(policy, asked), logps(base, asked), strict=True)]


SIDES = ("chosen", "rejected")
