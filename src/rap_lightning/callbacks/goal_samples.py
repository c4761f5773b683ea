"""Samples at each goal every N steps: how the goal comes to steer during fit."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rap_lightning.callbacks.goal_sampling import (
    Goal,
    Judge,
    JudgeFailed,
    Sample,
    check_goals,
    parts_of_fit,
    sample_at_goals,
    score,
    tell_watchdog,
)
from rap_lightning.callbacks.intervals import AtIntervals, Row
from rap_lightning.callbacks.run_tracking import log_table
from rap_lightning.callbacks.steering_table import SteeringTable
from rap_lightning.errors import ConfigError
from rap_lightning.evaluation.statistics import curve_spearman


class GoalSamples(AtIntervals):
    """Samples responses to some validation prompts at each goal, into ``samples.jsonl`` in the run's folder.

    A line is ``{"step", "goal", "prompt", "response", "score", "tokens"}``; the score is null without a judge. Logged
    are ``samples/goal-G/score`` and ``.../tokens``, and ``samples/spearman``, the rank correlation of goals and mean
    scores. Responses are sampled with the module's ``generation``. Trackers get the lines as a table too.

    Args:
        judge: a function of (prompt, response), by import path, that gives the reward; by default none.
        goals: rewards to ask for; by default four from the lowest to the highest of the scale. Without a goal template
            prompts state no goal.
        prompts: distinct validation prompts.
        samples: responses for each prompt at each goal.
        every_n_steps: optimizer steps between two samplings; also before the first step and after the last.
        seed: of the sampling, the same at every step; the run's own random numbers are left as they were.
    """

    file: ClassVar[str] = "samples.jsonl"

    def __init__(
        self, judge: Judge | None = None, goals: Sequence[float] | None = None, prompts: int = 8, samples: int = 1,
        every_n_steps: int = 100, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(every_n_steps)
        if prompts < 1 or samples < 1 or (goals is not None and not len(goals)):
            raise ConfigError("GoalSamples needs at least one prompt, one sample and one goal")
        self.judge, self.goals, self.prompts, self.samples, self.seed = judge, goals, prompts, samples, seed
        self._asked: list[Goal] = []
        self._histories: list[Any] = []
        self._failed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the goals, before the policy is loaded.

        Raises:
            ConfigError: they can't be asked for, or samples would be equal.
        """
        if stage != "fit":
            return
        ours, data = parts_of_fit(trainer, pl_module, "GoalSamples")
        if self.goals is not None:
            check_goals(data, self.goals, "GoalSamples")
            self._asked = [*sorted(map(float, self.goals))]
        else:
            self._asked = [None] if data.goal is None else [*data.goal.scale.grid(4)]
        if self.samples > 1 and ours.generation.temperature == 0:
            raise ConfigError("GoalSamples: samples above 1 would be equal at generation.temperature 0.")

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Choose prompts."""
        _, data = parts_of_fit(trainer, module, "GoalSamples")
        drawn = data.histories()[: self.prompts]
        if len(drawn) < self.prompts:
            rank_zero_info(f"GoalSamples: {len(drawn):,} distinct prompts, fewer than {self.prompts:,}")
        self._histories = [history for history in drawn for _ in range(self.samples)]

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[Row], dict[str, float]]:
        """Sample, and judge on rank zero."""
        ours, data = parts_of_fit(trainer, module, "GoalSamples")
        found = sample_at_goals(trainer, ours, data, self._histories, self._asked, self.seed, "GoalSamples")
        if not any(isinstance(callback, SteeringTable) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            tell_watchdog(trainer, found)  # a SteeringTable's samples have other prompts and may be longer
        if not trainer.is_global_zero:
            return [], {}
        rows = [
            {"goal": goal, "prompt": one.prompt, "response": one.text, "score": self._score(one), "tokens": one.tokens}
            for goal, samples in found.items() for one in samples
        ]  # fmt: skip
        columns = ("goal", "prompt", "response", "score", "tokens")
        log_table(trainer, "samples", columns, [[row[name] for name in columns] for row in rows])
        return rows, self._metrics(rows, trainer.global_step)

    def _score(self, sample: Sample) -> float | None:
        if self.judge is None:
            return None
        try:
            return score(self.judge, sample, "GoalSamples")
        except JudgeFailed as error:  # which must not end a run
            if not self._failed:
                rank_zero_warn(f"{error} Such scores are null.")
            self._failed = True
            return None

    def _metrics(self, rows: list[Row], step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        means: list[float] = []
        for goal in self._asked:
            mine = [row for row in rows if row["goal"] == goal]
            name = "samples/no-goal" if goal is None else f"samples/goal-{goal:g}"
            metrics[f"{name}/tokens"] = fmean(row["tokens"] for row in mine)
            if scores := [row["score"] for row in mine if row["score"] is not None]:
                metrics[f"{name}/score"] = fmean(scores)
                means.append(fmean(scores))
        if len(means) == len(self._asked) > 1:
            rank = float(curve_spearman(np.asarray(self._asked, dtype=np.float64), np.asarray([means]))[0])
            if np.isfinite(rank):  # not where all means are equal
                metrics["samples/spearman"] = rank
        if means:
            scores_of = {name: value for name, value in metrics.items() if name.endswith("/score")}
            shown = "  ".join(f"{name.split('/')[1]}: {value:.2f}" for name, value in scores_of.items())
            rank_zero_info(f"samples at step {step}, mean scores  {shown}")
        return metrics
