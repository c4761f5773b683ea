"""The small world as a data module: made where it isn't there yet, then read like any scored pairs."""

from __future__ import annotations

from typing import Any

from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.errors import DataError
from rap_lightning.world.make import make_world


class WorldDataModule(PreferenceDataModule):
    """Scored pairs of the embedded world, and the base model that speaks it at ``SOURCE/base``.

    Args:
        source: folder of the world; it is made, base model included, if it isn't there.
        train_pairs: scored pairs to train on.
        test_pairs: scored pairs to validate on, about other prompts.
        base_steps: optimizer steps of the base model.
        world_seed: of prompts, pairs and base model.
        options: those of PreferenceDataModule.
    """

    def __init__(
        self,
        source: str = "runs/world",
        train_pairs: int = 2000,
        test_pairs: int = 200,
        base_steps: int = 600,
        world_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        self._settings = {
            "train_pairs": train_pairs, "test_pairs": test_pairs, "base_steps": base_steps, "seed": world_seed,
        }  # fmt: skip

    def prepare_data(self) -> None:
        """Make the world, then fill the cache as every data module does."""
        try:
            make_world(self.sources[0].path, **self._settings)
        except ValueError as error:
            raise DataError(str(error)) from error
        super().prepare_data()
