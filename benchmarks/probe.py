"""Does the probe of goals predict what training does? Candidate figures against the result of a short training.

    python benchmarks/probe.py --worlds DIR --output FILE.jsonl     # one line of JSON per case; a stopped run continues
    python benchmarks/probe.py --output FILE.jsonl --table

A case is a base model of the embedded world (how many of its training examples stated a goal, with which error), a goal
template with its placement, and a seed (of world, base and training). Before training, ``figures_of`` computes the
candidates on training pairs; `rap-lightning inspect --model` goes by the agreement of pairs. What training did is
measured on held-out pairs under both goals during DPO on both halves: the accuracy is 50% for any policy that ignores
the goal. The first seed chooses a figure, the others confirm it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.evaluation import Bootstrap
from rap_lightning.evaluation.statistics import spearman
from rap_lightning.losses import DPO
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.training.goal_probe import AMONG, encode_halves, load_policy, margin_gradients, sample_pairs
from rap_lightning.training.schedules import ConstantWithWarmup
from rap_lightning.world.make import make_world

WORDS = ("terrible", "poor", "mediocre", "good", "excellent")
BASES = {
    "no goals": {"goal_share": 0.0},
    "all with goals": {"goal_share": 1.0, "goal_noise": 0.5},
    "70% with noisy goals": {"goal_share": 0.7, "goal_noise": 2.5},
    "10% with goals": {"goal_share": 0.1, "goal_noise": 0.5},
}


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


TEMPLATES = {
    "overall, system": OverallGoal(placement="system"),
    "overall, user": OverallGoal(placement="user"),
    "word, system": Word(placement="system"),
    "repeated, system": Repeated(placement="system"),
}


class Curve(pl.Callback):
    """Collects the held-out figures of each validation."""

    def __init__(self) -> None:
        self.points: dict[str, dict[str, float]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep them under the step's number, as JSON writes it."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.points[str(trainer.global_step)] = {
            "accuracy": found["val/rewards/accuracies"], "margin": found["val/rewards/margins"],
        }  # fmt: skip


def figures_of(base: Path, data: PreferenceDataModule, pairs: int) -> dict[str, float]:
    """Return the candidates, measured on pairs with wide gaps (P pairs, N weights of the adapter)."""
    drawn = sample_pairs(data.scored_pairs("train", pairs * AMONG, 0), pairs, 0)
    high, low = zip(*margin_gradients(load_policy(str(base)), encode_halves(drawn, data.encoder)), strict=True)
    m_w, m_l = (np.asarray([m for m, _ in half]) for half in (high, low))
    g_w, g_l = (torch.stack([g for _, g in half]).double() for half in (high, low))  # [P, N]
    shift, left, plain = m_w - m_l, g_w - g_l, g_w + g_l

    def between(g: torch.Tensor) -> float:
        """Return the mean product of two different pairs' gradients: what a step on one does for another."""
        return float(g.sum(0).square().sum() - g.square().sum()) / (len(g) * (len(g) - 1))

    lengths = float((g_w.norm(dim=1) + g_l.norm(dim=1)).mean())
    return {
        "share per pair": float((left.norm(dim=1) / (g_w.norm(dim=1) + g_l.norm(dim=1))).mean()),
        "share of the mean": float(left.mean(0).norm() / (g_w.mean(0).norm() + g_l.mean(0).norm())),
        "mean left, of pairs' lengths": float(left.mean(0).norm()) / lengths,
        "agreement of pairs": between(left / left.norm(dim=1, keepdim=True)),
        "pairs help each other": between(left),
        "that, of plain DPO's": between(left) / between(plain),
        "length left, nats": float(left.norm(dim=1).mean()),
        "shift, nats": float(shift.mean()),
        "size of the mean shift": abs(float(shift.mean())),
        "mean size of the shifts": float(np.abs(shift).mean()),
        "shift in its spreads": float(shift.mean() / shift.std()),
        "size of shifts, of margins": float(np.abs(shift).mean() / (np.abs(m_w) + np.abs(m_l)).mean()),
        "shift, of margins' spread": float(shift.mean() / ((m_w + m_l) / 2).std()),
    }


def case(world: Path, goal: GoalTemplate, seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """Probe a template on the world's base, and train with it."""
    pl.seed_everything(seed, verbose=False)
    curve, base = Curve(), world / "base"
    module = PreferenceModule(
        PolicyConfig(str(base)), loss=DPO(0.5), schedule=ConstantWithWarmup(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=a.lr),
    )  # fmt: skip
    data = PreferenceDataModule(str(world), goal=goal, max_length=256, batch_size=16)
    trainer = pl.Trainer(
        max_steps=a.steps, val_check_interval=a.steps // 2, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[curve],
    )  # fmt: skip
    trainer.fit(module, data)
    return {"figures": figures_of(base, data, a.pairs), "curve": curve.points}


def tables(rows: list[dict[str, Any]]) -> str:
    """Return rank correlations of figures and results, and the cases, as Markdown; S seeds, C cases of every seed."""
    of = {(row["seed"], row["base"], row["goal"]): row for row in rows}
    seeds = sorted({seed for seed, *_ in of})
    cases = [one for one in itertools.product(BASES, TEMPLATES) if all((seed, *one) in of for seed in seeds)]
    table = [[of[(seed, *one)] for one in cases] for seed in seeds]
    names = list(rows[0]["figures"])
    figures = {name: np.asarray([[one["figures"][name] for one in row] for row in table]) for name in names}
    results = {
        name: np.asarray([[np.mean([point[name] for point in one["curve"].values()]) for one in row] for row in table])
        for name in ("accuracy", "margin")
    }  # [S, C], the mean over the validations
    same_base = [np.asarray([base == one for base, _ in cases]) for one in dict.fromkeys(base for base, _ in cases)]

    def cells(x: np.ndarray, y: np.ndarray) -> list[str]:
        """Return the correlation of each seed, that of the means over seeds with its interval, and within a base."""
        means = x.mean(0), y.mean(0)
        every = [float(spearman(*one, np.ones((1, len(cases))))[0]) for one in zip(x, y, strict=True)]
        whole = Bootstrap(range(len(cases))).figure(lambda w: spearman(*means, w), "too few cases")
        within = [spearman(means[0][among], means[1][among], np.ones((1, among.sum())))[0] for among in same_base]
        between = f"{whole.value:.2f} ({whole.low:.2f} to {whole.high:.2f})"
        return [*(f"{one:.2f}" for one in every), between, f"{np.nanmean(within):.2f}"]

    titles = [*(f"seed {seed}" for seed in seeds), "means", "within a base"]
    lines = [f"| figure | {' | '.join(f'{name}: {title}' for name in results for title in titles)} |"]
    lines.append("|---" * (1 + len(results) * len(titles)) + "|")
    for name, x in figures.items():
        lines.append(f"| {name} | {' | '.join(cell for y in results.values() for cell in cells(x, y))} |")
    for name, y in results.items():
        repeats = spearman(y[0], y[-1], np.ones((1, len(cases))))[0]
        lines.append(f"\n{name} of the first seed and of the last: Spearman {repeats:.2f} over {len(cases)} cases")
    shown = ("agreement of pairs", "share per pair", "shift, nats")
    steps = list(table[0][0]["curve"])
    lines += ["", f"| base | goal | {' | '.join(shown)} | accuracy at {', '.join(steps)} steps | margin (nats) |"]
    lines.append("|---" * (4 + len(shown)) + "|")
    for place in np.argsort(-results["accuracy"].mean(0)):
        figure = " | ".join(f"{figures[name][:, place].mean():.3f}" for name in shown)
        curve = [{at: np.mean([row[place]["curve"][at][name] for row in table]) for at in steps} for name in results]
        accuracy, margin = (", ".join(f"{y:.3f}" for y in one.values()) for one in curve)
        lines.append(f"| {' | '.join(cases[place])} | {figure} | {accuracy} | {margin} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cases that the output lacks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=Path, required=True, help="a folder for the worlds, which are made once")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, read and continued")
    for name, default in (("seeds", 2), ("base_steps", 600), ("steps", 80), ("pairs", 32), ("test_pairs", 600)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-4)
    a = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [json.loads(line) for line in a.output.read_text().splitlines()] if a.output.is_file() else []
    done = {(row["seed"], row["base"], row["goal"]) for row in rows}
    for (base, options), seed, (name, goal) in itertools.product(BASES.items(), range(a.seeds), TEMPLATES.items()):
        if (seed, base, name) in done:
            continue
        world = a.worlds / f"{base.replace(' ', '-')}-{seed}"
        make_world(world, base_steps=a.base_steps, seed=seed, train_pairs=1200, test_pairs=a.test_pairs, **options)
        rows.append({"seed": seed, "base": base, "goal": name} | case(world, goal, seed, a))
        with a.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print(tables(rows))


if __name__ == "__main__":
    main()
