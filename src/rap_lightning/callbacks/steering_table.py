"""A table of judged samples at goals from low to high, before and after training: does the goal steer?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rap_lightning.atomic_write import atomic_file
from rap_lightning.callbacks.goal_sampling import (
    Judge,
    check_goals,
    log_now,
    parts_of_fit,
    sample_at_goals,
    score,
    tell_watchdog,
)
from rap_lightning.callbacks.run_folder import run_folder, written_or_warned
from rap_lightning.callbacks.run_tracking import log_table
from rap_lightning.errors import ConfigError

FILE = "steering.json"
"""The table's file in the run's folder."""


class SteeringTable(pl.Callback):
    """Samples responses at several goals before and after fit, and prints how a judge scores them.

    The run's folder gets ``steering.json``: the mean score at each goal before and after, and the samples shown.

    Args:
        judge: a function of (prompt, response), by import path, that gives the reward.
        goals: rewards to ask for, low to high.
        samples: responses sampled at each goal; validation prompts are repeated where there are fewer.
        seed: of the sampling; the run's own random numbers are left as they were.
        beside: folder of another run with this callback, or of several, of which the newest is taken: its scores and
            samples are shown beside this run's. Its goals, samples, seed (hence prompts) and the module's
            ``generation`` must be the same.
    """

    def __init__(
        self,
        judge: Judge,
        goals: Sequence[float] = (1, 4, 7, 10),
        samples: int = 64,
        seed: int = 0,
        beside: str | None = None,
    ) -> None:
        if len(goals) < 2 or samples < 2:
            raise ConfigError("SteeringTable needs at least two goals and two samples")
        self.judge, self.goals, self.samples, self.seed = judge, sorted(goals), samples, seed
        self.beside = beside
        self._other: dict[str, Any] | None = None
        self._generation: dict[str, Any] = {}
        self.before: dict[float, list[float]] = {}
        self.after: dict[float, list[float]] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the goals, and read the run of ``beside``, before the policy is loaded.

        Raises:
            ConfigError: goals can't be asked for, or that run is not found or not comparable.
        """
        if stage != "fit":
            return
        module, data = parts_of_fit(trainer, pl_module, "SteeringTable")
        check_goals(data, self.goals, "SteeringTable")
        self._generation = module.generation.settings()
        if self.beside is not None:
            self._other = self._read(Path(self.beside))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample the untrained policy.

        Raises:
            ConfigError: the judge fails.
        """
        self.before = {goal: [s for _, _, s in rows] for goal, rows in self._sample(trainer, pl_module).items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample the trained policy and print the table; without it, with a warning, where the judge fails now."""
        try:
            samples = self._sample(trainer, pl_module)
        except ConfigError as error:
            rank_zero_warn(f"{error} There is no table; the policy is trained.")
            return
        self.after = {goal: [score for _, _, score in rows] for goal, rows in samples.items()}
        if trainer.is_global_zero:
            self._print(trainer, pl_module, samples)
            self._write(trainer, run_folder(trainer) / FILE, samples)

    def _sample(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[float, list[tuple[str, str, float]]]:
        ours, data = parts_of_fit(trainer, module, "SteeringTable")
        distinct = data.histories()
        histories = [distinct[i % len(distinct)] for i in range(self.samples)]
        found = sample_at_goals(trainer, ours, data, histories, self.goals, self.seed, "SteeringTable")
        tell_watchdog(trainer, found)
        return {
            goal: [(one.prompt, one.text, score(self.judge, one, "SteeringTable")) for one in found[goal]]
            for goal in self.goals
        }

    def _settings(self) -> dict[str, Any]:
        """Return what two runs must have in common to be compared."""
        return {
            "goals": list(self.goals), "samples": self.samples, "seed": self.seed, "generation": self._generation
        }  # fmt: skip

    def _read(self, folder: Path) -> dict[str, Any]:
        found = sorted(folder.rglob(FILE), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(
                f"SteeringTable: no {FILE} below {folder}. Train the other run first, with this callback, or remove "
                "beside."
            )
        other: dict[str, Any] = json.loads(found[-1].read_text())
        theirs = {name: other.get(name) for name in self._settings()}
        if theirs != self._settings():
            raise ConfigError(
                f"SteeringTable: {found[-1]} was sampled with {theirs}, and this run samples with {self._settings()}. "
                "To compare them, use the same goals, samples, seed and --model.generation."
            )
        return other

    def _write(self, trainer: pl.Trainer, path: Path, samples: dict[float, list[tuple[str, str, float]]]) -> None:
        rows = [
            {
                "before": _figures(self.before[goal]), "after": _figures(self.after[goal]),
                "prompt": samples[goal][0][0], "response": samples[goal][0][1], "score": samples[goal][0][2],
            }
            for goal in self.goals
        ]  # fmt: skip
        with written_or_warned(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(json.dumps({**self._settings(), "rows": rows}, indent=1) + "\n")
        columns = ("goal", "before", "after", "prompt", "response", "score")
        cells = [[goal, fmean(self.before[goal]), fmean(self.after[goal]), *samples[goal][0]] for goal in self.goals]
        log_table(trainer, "steering", columns, cells)

    def _print(self, trainer: pl.Trainer, module: Any, samples: dict[float, list[Any]]) -> None:
        options, count = module.generation, len(next(iter(samples.values())))
        heat = f"temperature {options.temperature:g}"
        floor = f", floor {options.plausibility:g}" if options.plausibility is not None else ""
        guided = f", guidance {options.guidance:g}" if options.guidance else ""
        table = Table(
            title=f"Mean score at each goal ({count} samples a goal, {heat}{guided}{floor})",
            caption="mean score ± standard error, by the judge; the samples are the trained policy's",
        )
        for name in ("goal", "before", "after"):
            table.add_column(name, justify="right")
        table.add_column("a sample after training (its score)", overflow="fold")
        other = None if self._other is None or self.beside is None else self._other["rows"]
        if other is not None:
            name = Path(self.beside or "").name
            table.add_column(name, justify="right")
            table.add_column(f"a sample of {name} (its score)", overflow="fold")
        prompt_of_first = samples[self.goals[0]][0][0]
        for place, goal in enumerate(self.goals):
            _, text, score = samples[goal][0]
            cells = [f"{goal:g}", *(_shown(_figures(scores[goal])) for scores in (self.before, self.after))]
            cells.append(_sample(text, score))
            if other is not None:
                cells += [_shown(other[place]["after"]), _sample(other[place]["response"], other[place]["score"])]
            table.add_row(*cells)
        console = Console(width=None if Console().is_terminal else 120)
        console.print(table)
        console.print(f"Prompt for the samples: {escape(prompt_of_first)}", highlight=False)
        log_now(trainer, {f"steering/goal-{goal:g}": fmean(self.after[goal]) for goal in self.goals})


def _figures(scores: list[float]) -> dict[str, float]:
    """Return mean and standard error."""
    return {"mean": fmean(scores), "error": stdev(scores) / len(scores) ** 0.5}


def _shown(figures: dict[str, float]) -> str:
    return f"{figures['mean']:.2f} ± {figures['error']:.2f}"


def _sample(text: str, score: float) -> str:
    return f"{escape(text.strip())} [dim]({score:g})[/dim]"
