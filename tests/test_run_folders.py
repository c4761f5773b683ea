"""Runs that start at once have a folder each."""

import csv
import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

import kills
from cli_process import RankPair
from conftest import make_trainer
from rap_lightning.callbacks.run_folder import ClaimedFolder

FAST = ("tree", "table", 0, "full")


def test_two_loggers_claim_two_folders_before_either_has_written(tmp_path: Path) -> None:
    (tmp_path / "version_3").mkdir()  # of a start that was killed
    trainers = [make_trainer(tmp_path) for _ in range(3)]
    for trainer in trainers:
        ClaimedFolder(trainer)
    assert [trainer.logger.version for trainer in trainers] == [4, 5, 6]
    assert [trainer.logger.version for trainer in trainers] == [4, 5, 6]


def test_a_version_that_was_given_is_kept(tmp_path: Path) -> None:
    for version in (2, "mine", ""):
        trainer = Trainer(logger=CSVLogger(tmp_path, name="", version=version), accelerator="cpu")
        ClaimedFolder(trainer)
        assert trainer.logger.version == version
    assert not list(tmp_path.iterdir())


def test_runs_started_together_each_write_their_own_folder(start_process: Any, world: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (root / "version_0").mkdir(parents=True)
    arguments = kills.arguments(world, root, FAST, steps=2)
    arguments = [*arguments[: arguments.index("--ckpt_path")], "--trainer.log_every_n_steps", "1"]
    named = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(root), "--trainer.logger.name", ""]
    more = [[], ["--model.loss", "IPO"], named]
    started = [start_process([*arguments, "--seed_everything", str(n), *one]) for n, one in enumerate(more)]
    assert [run.end() for run in started] == [0, 0, 0], started[0].said[-2000:]
    folders = sorted(root.iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2", "version_3"]
    seeds = set()
    for folder in folders[1:]:
        record = json.loads((folder / "run.json").read_text())
        seeds.add(record["seed"])
        assert f"seed_everything: {record['seed']}\n" in (folder / "config.yaml").read_text()
        with (folder / "metrics.csv").open() as file:
            assert {row["step"] for row in csv.DictReader(file)} >= {"1", "2"}
        assert [path.name for path in kills.checkpoints(folder)]
    assert seeds == {0, 1, 2}


def test_ranks_of_a_run_agree_on_its_folder(start_process: Any, world: Path, tmp_path: Path) -> None:
    arguments = kills.arguments(world, tmp_path / "runs", FAST, steps=2)
    arguments = [*arguments[: arguments.index("--ckpt_path")], "--trainer.accumulate_grad_batches", "1"]
    pair = RankPair(start_process, arguments, ["--trainer.strategy", "ddp"])
    assert pair.end() == [0, 0], pair.said[-2000:]
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["version_0"]
