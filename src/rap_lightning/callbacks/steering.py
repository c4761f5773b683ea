"""Does the goal steer? Samples at goals from low to high, judged, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rap_lightning.callbacks.sampling import parts_of_fit, sample_at_goals
from rap_lightning.callbacks.watchdog import Watchdog
from rap_lightning.errors import ConfigError

Judge = Callable[[str, str], float]
"""(prompt, response) -> reward on the goal template's scale"""


class SteeringTable(pl.Callback):
    """Samples responses at several goals before and after fit, and prints how a judge scores them.

    Args:
        judge: a function of (prompt, response), by import path, that gives the reward.
        goals: rewards to ask for, low to high.
        samples: how many responses are sampled at each goal; validation prompts repeat where there are fewer.
        seed: of the sampling; the run's own random numbers are left as they were.
    """

    def __init__(self, judge: Judge, goals: Sequence[float] = (1, 4, 7, 10), samples: int = 64, seed: int = 0) -> None:
        if len(goals) < 2 or samples < 2:
            raise ConfigError("SteeringTable needs at least two goals and two samples")
        self.judge, self.goals, self.samples, self.seed = judge, sorted(goals), samples, seed
        self.before: dict[float, list[float]] = {}
        self.after: dict[float, list[float]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample the untrained policy."""
        self.before = {goal: [s for _, _, s in rows] for goal, rows in self._sample(trainer, pl_module).items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample the trained policy and print the table."""
        samples = self._sample(trainer, pl_module)
        self.after = {goal: [score for _, _, score in rows] for goal, rows in samples.items()}
        if trainer.is_global_zero:
            self._print(trainer, pl_module, samples)

    def _sample(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[float, list[tuple[str, str, float]]]:
        ours, data = parts_of_fit(trainer, module, "SteeringTable")
        if data.goal is None:
            raise ConfigError("SteeringTable needs data with a goal template; remove it from the callbacks.")
        distinct = data.histories()
        histories = [distinct[i % len(distinct)] for i in range(self.samples)]
        found = sample_at_goals(trainer, ours, data, histories, self.goals, self.seed, "SteeringTable")
        lengths = [one.tokens for samples in found.values() for one in samples]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Watchdog):
                callback.saw_samples(lengths, trainer.global_step)
        return {
            goal: [(one.prompt, one.text, self.judge(one.prompt, one.text)) for one in found[goal]]
            for goal in self.goals
        }

    def _print(self, trainer: pl.Trainer, module: Any, samples: dict[float, list[Any]]) -> None:
        options, count = module.generation, len(next(iter(samples.values())))
        table = Table(
            title=f"Asked for a score, what comes back ({count} samples a goal, temperature {options.temperature:g})",
            caption="mean score ± standard error, by the judge; the samples are of the trained policy",
        )
        for name in ("goal", "before", "after"):
            table.add_column(name, justify="right")
        table.add_column("a sample after training (its score)", overflow="fold")
        prompt_of_first = samples[self.goals[0]][0][0]
        for goal in self.goals:
            _, text, score = samples[goal][0]
            shown = f"{escape(text.strip())} [dim]({score:g})[/dim]"
            table.add_row(f"{goal:g}", _mean(self.before[goal]), _mean(self.after[goal]), shown)
        console = Console(width=None if Console().is_terminal else 120)
        console.print(table)
        console.print(f"The samples answer: {escape(prompt_of_first)}", highlight=False)
        logged = {f"steering/goal-{goal:g}": fmean(self.after[goal]) for goal in self.goals}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)
            logger.save()


def _mean(scores: list[float]) -> str:
    return f"{fmean(scores):.2f} ± {stdev(scores) / len(scores) ** 0.5:.2f}"
