"""The embedded world as a data module: made if it doesn't exist, then read like any scored pairs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.errors import DataError
from rap_lightning.world.make import make_world, options_for
from rap_lightning.world.world_data import BEST, FAMILIES_BY_DEFAULT, HABIT


class WorldDataModule(PreferenceDataModule):
    """Scored pairs of the embedded world, and its base model at ``SOURCE/base``.

    Args:
        source: folder of the world; it is made, base model included, if it doesn't exist.
        train_pairs: number of training pairs.
        test_pairs: number of validation pairs, with other prompts.
        base_steps: optimizer steps of the base model.
        world_seed: seed of prompts, pairs and base model.
        families: kinds of prompts: words, numbers, words-backwards, numbers-backwards; by default the first two.
        lean: skew of the qualities towards low, above -1; negative values skew them towards high.
        best: the highest quality of a response, 0 to 1: the lower, the rarer top scores (docs/world.md has shares).
        contrast: how far a pair's responses are moved apart, 0 to 1: the higher, the fewer good losers and bad winners.
        judge_noise: standard deviation, in points, of the noise in the data's scores.
        on_policy: fraction of the pairs that the base model wrote, 0 to 1.
        goal_share: fraction of the base model's training examples that state a goal; at 0 it has never seen one.
        goal_noise: standard deviation, in points, of the error of the last of these goals; the lower, the better the
            base model knows goals.
        habit: fraction of the base model's training responses that are one item short and end with the same stray, 0 to
            1: the higher, the more room training has above the base model.
        options: options of PreferenceDataModule.
    """

    def __init__(
        self,
        source: str = "runs/world",
        train_pairs: int = 2000,
        test_pairs: int = 200,
        base_steps: int = 600,
        world_seed: int = 0,
        families: list[str] | None = None,
        lean: float = 0.3,
        best: float = BEST,
        contrast: float = 0.0,
        judge_noise: float = 0.0,
        on_policy: float = 0.0,
        goal_share: float = 0.7,
        goal_noise: float = 2.5,
        habit: float = HABIT,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        self._settings: dict[str, Any] = {
            "train_pairs": train_pairs, "test_pairs": test_pairs, "base_steps": base_steps, "seed": world_seed,
            "families": FAMILIES_BY_DEFAULT if families is None else families, "lean": lean, "best": best,
            "contrast": contrast, "judge_noise": judge_noise, "on_policy": on_policy,
            "goal_share": goal_share, "goal_noise": goal_noise, "habit": habit,
        }  # fmt: skip

    def how_to_make(self, path: str) -> str:
        """Return a sentence on how to make the base model at ``path`` beforehand; "" if fit makes none there."""
        source = self.sources[0].path
        if Path(path) != Path(source) / "base":
            return ""
        defaults = {name: parameter.default for name, parameter in signature(make_world).parameters.items()}
        others = [name for name, value in self._settings.items() if value != defaults[name]]
        options = options_for(self._settings, others)
        command = f"python -m rap_lightning.world {source} {options}".strip()
        return f"fit makes it when it starts; to make it beforehand (about a minute): {command}"

    def prepare_data(self) -> None:
        """Make the world, then prepare the data as every data module does."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            self._make_in_process()
        else:
            try:
                make_world(self.sources[0].path, **self._settings)
            except ValueError as error:
                raise DataError(str(error)) from error
        super().prepare_data()

    def _make_in_process(self) -> None:
        """Make the world in a separate process: within a process group, transformers saves models on rank 0 only."""
        options = shlex.split(options_for(self._settings, self._settings))
        command = [sys.executable, "-m", "rap_lightning.world", self.sources[0].path, *options]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise DataError(made.stderr.strip().rpartition("error: ")[2] or f"{shlex.join(command)} failed")
        print(made.stdout, end="")
