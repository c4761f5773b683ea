"""Does the probe of goals predict what training does? Its figure and the result of a short training, over cases.

    python benchmarks/probe.py [--worlds DIR] [--base_steps 600] [--steps 80] [--pairs 12] [--output FILE.jsonl]

A case is a base model of the embedded world (one that has seen goals in its pre-training, one that has not) and a
goal template with its placement. The probe's figure is the share of plain DPO's gradient that is left, of the mean over
pairs (`rap-lightning inspect --model`). What training did is the accuracy on held-out pairs after some steps of DPO on
both halves: 50% for any policy that ignores the goal, since each pair comes in both orders.
Prints a Markdown table and rank correlations (Spearman), those with the held-out margin included.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from rap_lightning.commands.goal_table import probe_goals
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.evaluation.statistics import spearman
from rap_lightning.losses import DPO
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.training.schedules import ConstantWithWarmup
from rap_lightning.world.make import make_world

WORDS = ("terrible", "poor", "mediocre", "good", "excellent")


class Short(GoalTemplate):
    """A number and nothing else."""

    def text(self, goal: float) -> str:  # type: ignore[override]
        """Return the text."""
        return f"score {self.scale.printed(goal)}"


class Word(GoalTemplate):
    """One of five words: coarser than a number, and each of them one token or two."""

    def text(self, goal: float) -> str:  # type: ignore[override]
        """Return the text."""
        share = (goal - self.scale.low) / (self.scale.high - self.scale.low)
        return f"a {WORDS[min(4, int(5 * share))]} answer"


class Repeated(GoalTemplate):
    """The number ten times."""

    def text(self, goal: float) -> str:  # type: ignore[override]
        """Return the text."""
        return " ".join([self.scale.printed(goal)] * 10)


TEMPLATES = (
    OverallGoal(placement="system"), OverallGoal(placement="user"), Short(placement="system"), Word(placement="system"),
    Repeated(placement="system"),
)  # fmt: skip


def main() -> None:
    """Run all cases, print the table, and append each case to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=Path, default=None)
    for name, default in (("base_steps", 600), ("steps", 80), ("pairs", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--output", type=Path, default=None)
    a = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = a.worlds or Path(temporary)
        for base, share in (("has seen goals", 0.7), ("never saw goals", 0.0)):
            world = root / f"goal-share-{share:g}-{a.base_steps}"
            make_world(world, base_steps=a.base_steps, goal_share=share, train_pairs=1200, test_pairs=100)
            for goal in TEMPLATES:
                row = {"base": base} | case(world, goal, a.steps, a.pairs, a.lr)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if a.output is not None:
                    with a.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(rows))


def case(world: Path, goal: GoalTemplate, steps: int, pairs: int, lr: float) -> dict[str, Any]:
    """Probe a template on the world's base, and train with it."""
    read = ReadingOptions(str(world / "train.jsonl"), goal=goal, tool_turns=False)
    (found,) = probe_goals(str(world / "base"), None, pairs, read, "train", 512)
    pl.seed_everything(0, verbose=False)
    module = PreferenceModule(
        PolicyConfig(str(world / "base")), loss=DPO(0.5), schedule=ConstantWithWarmup(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
    )  # fmt: skip
    data = PreferenceDataModule(str(world), goal=goal, max_length=256, batch_size=16)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=steps,
    )  # fmt: skip
    trainer.fit(module, data)
    result = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "goal": f"{type(goal).__name__}, {goal.placement}", "shift": found.shift.value, "left": found.left,
        "left_of_mean": found.left_of_mean, "accuracy": result["val/rewards/accuracies"],
        "margin": result["val/rewards/margins"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the cases as Markdown, with the rank correlation of the probe's figure and the accuracy."""
    lines = [
        "| base | goal | margin shift (nats) | gradient left, per pair | of the mean | held-out accuracy | "
        "held-out margin |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: -float(one["left"])):
        lines.append(
            f"| {row['base']} | {row['goal']} | {row['shift']:+.2f} | {row['left']:.1%} | {row['left_of_mean']:.1%} | "
            f"{row['accuracy']:.1%} | {row['margin']:.3f} |"
        )
    of = {name: np.asarray([row[name] for row in rows]) for name in rows[0] if name not in ("base", "goal")}
    once = np.ones((1, len(rows)))
    for figure in ("shift", "left", "left_of_mean"):
        found = [f"{spearman(of[figure], of[result], once)[0]:.2f} with {result}" for result in ("accuracy", "margin")]
        lines.append(f"\nSpearman of {figure} over {len(rows)} cases: {', '.join(found)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
