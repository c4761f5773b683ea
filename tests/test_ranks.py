"""Two processes: they decide alike, stop together, save together, and go on exactly."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import kills
from cli_process import RankPair
from conftest import flip_bit
from rap_lightning.models.checkpoint.integrity import verify

pytestmark = pytest.mark.timeout(1200)
DDP = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.process_group_backend", "gloo"]
FSDP2 = [
    "--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "2",
    "--trainer.strategy.tensor_parallel_size", "1", "--trainer.strategy.process_group_backend", "gloo",
]  # fmt: skip


def arguments(world: Path, root: Path, *more: str, steps: int = 6, kind: str = "full") -> list[str]:
    common = kills.arguments(world, root, ("tree", "table", 0, kind), steps=steps)
    return [*common, "--trainer.log_every_n_steps", "1", *more]


def last(root: Path) -> Any:
    return torch.load(kills.checkpoints(root)[-1], weights_only=True)


def test_a_step_that_one_rank_finds_broken_is_skipped_by_both_as_by_one(
    start_process: Any, world: Path, tmp_path: Path
) -> None:
    sgd = [
        "--model.optimizer",
        "torch.optim.SGD",
        "--model.optimizer.lr",
        "0.1",
        "--model.loss",
        "failing_losses.ByLength",
    ]
    # one response of the world has that length
    skip = [*sgd, "--model.loss.length", "3", "--guard.non_finite", "skip"]
    one = start_process([*arguments(world, tmp_path / "one", *skip), "--data.batch_size", "8"])
    two = RankPair(start_process, arguments(world, tmp_path / "two", *skip), DDP)
    assert one.end() == 0, one.said[-2000:]
    assert two.end() == [0, 0], two.said[-2000:]
    steps = [
        re.findall(r"skipped \(\d+ so far\): step (\d+): the loss is not finite for pair", said.said)
        for said in (one, two)
    ]
    assert steps[0] == steps[1]
    assert 0 < len(steps[0]) < 6
    for name, weight in last(tmp_path / "one")["state_dict"].items():
        torch.testing.assert_close(weight, last(tmp_path / "two")["state_dict"][name], rtol=1e-5, atol=1e-6)
    stop = RankPair(start_process, arguments(world, tmp_path / "stop", *sgd, "--model.loss.length", "3"), DDP)
    assert stop.end() == [2, 2]
    assert len(re.findall(r"error: step \d+: the loss is not finite.*", stop.ranks[0].said)) == 1
    assert "error:" not in stop.ranks[1].said, "said once"
    assert last(tmp_path / "stop")["global_step"] == int(steps[0][0]) - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_sigterm_to_one_rank_stops_both_at_one_step_and_they_go_on_exactly(
    kind: str, start_process: Any, world: Path, tmp_path: Path
) -> None:
    """With dropout, whose random numbers each rank has of its own."""
    rare = ["--checkpoint.every_n_train_steps", "100000"]
    long = {"kind": kind, "steps": 40}
    run = RankPair(start_process, arguments(world, tmp_path / "run", *rare, "--trainer.max_epochs", "99", **long), DDP)
    run.ranks[0].wait_for("step 3/")
    os.kill(run.ranks[0].process.pid, signal.SIGTERM)
    assert run.end() == [143, 143], run.said[-3000:]
    assert 3 <= last(tmp_path / "run")["global_step"] < 40
    again = RankPair(
        start_process, arguments(world, tmp_path / "run", *rare, "--trainer.max_epochs", "99", **long), DDP
    )
    assert again.end() == [0, 0], again.said[-2000:]
    whole = RankPair(
        start_process, arguments(world, tmp_path / "whole", *rare, "--trainer.max_epochs", "99", **long), DDP
    )
    assert whole.end() == [0, 0]
    assert kills.outcome(tmp_path / "run", 40) == kills.outcome(tmp_path / "whole", 40) != ""


@pytest.mark.slow
def test_a_sharded_checkpoint_is_verified_and_resumed(start_process: Any, world: Path, tmp_path: Path) -> None:
    whole = RankPair(start_process, arguments(world, tmp_path / "whole", "--export.enabled", "true"), FSDP2)
    assert whole.end() == [0, 0], whole.said[-2000:]
    keep = ["--checkpoint.save_top_k", "-1", "--checkpoint.save_last", "false"]
    run = RankPair(start_process, arguments(world, tmp_path / "run", *keep), FSDP2)
    assert run.end() == [0, 0], run.said[-2000:]
    folders = sorted((tmp_path / "run").rglob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    assert len(folders) == 6
    for folder in folders:
        assert verify(folder), "with the checksum of its index"
        assert len(list(folder.glob("*.distcp"))) == 2
    for folder in folders[3:]:
        flip_bit(next(folder.glob("__0_*.distcp")))
    again = RankPair(start_process, arguments(world, tmp_path / "run", "--export.enabled", "true"), FSDP2)
    assert again.end() == [0, 0], again.said[-2000:]
    assert again.said.count("distcp is refused: its content is not what was written") == 3
    assert f"--ckpt_path last: {folders[2]}" in again.said
    files = [next((tmp_path / name).rglob("hf/model.safetensors")).read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]
