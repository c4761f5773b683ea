"""What PreferenceModule and PreferenceDataModule ask of each other, as two protocols.

Each side looks for the other on the trainer (``trainer.datamodule``, ``trainer.lightning_module``) and works without
it: PreferenceModule can train on a user's own loaders, and PreferenceDataModule can feed a user's own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

# not from typing: before Python 3.12 its isinstance evaluates properties, such as has_rewards, which reads the data
from typing_extensions import Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rap_lightning.batches.loader import PairLoader
    from rap_lightning.models.generation import Generation
    from rap_lightning.preferences.goals import GoalTemplate
    from rap_lightning.preferences.relabelling import Relabelling


@runtime_checkable
class PreferenceData(Protocol):
    """What the module asks of its data module."""

    goal: GoalTemplate | None
    relabelling: Relabelling
    layout: str
    batch_size: int
    token_budget: int | None
    rejected_weight: float
    best_goal_weight: float
    weight_column: str | None
    streaming: bool

    @property
    def has_rewards(self) -> bool:
        """Whether every training pair has rewards."""
        ...

    def train_dataloader(self) -> PairLoader:
        """Batches to train on."""
        ...

    def val_dataloader(self) -> PairLoader | list[Any]:
        """Batches to validate on; an empty list where there are none."""
        ...


@runtime_checkable
class PreferencePolicy(Protocol):
    """What the data module asks of its module."""

    generation: Generation

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        ...

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss compares the pairs of a batch, which then may not be sorted by length."""
        ...


def data_of(trainer: pl.Trainer | None) -> PreferenceData | None:
    """The trainer's data module, or None without one or with one that is not a PreferenceData."""
    data = None if trainer is None else trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, PreferenceData) else None


def policy_of(trainer: pl.Trainer | None) -> PreferencePolicy | None:
    """The trainer's module, or None without one or with one that is not a PreferencePolicy."""
    module = None if trainer is None else trainer.lightning_module
    return module if isinstance(module, PreferencePolicy) else None
