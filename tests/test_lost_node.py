"""Two hosts, one of which is killed in the middle of training; then the run goes on on what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
from rap_lightning.models.checkpoint.integrity import INDEX_CHECKSUM
from rap_lightning.models.hf_export import read_tensors

FIT = ["-m", "rap_lightning.cli.main", "fit"]
TIMEOUT = 15


def options(base: dict[str, Any], root: Path, ranks: int, *more: str, batch_size: int = 6) -> list[str]:
    return [
        "--model.policy.path", base["model"], "--data.source", base["data"], "--data.max_length", "160",
        "--data.batch_size", str(batch_size), "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.02",
        "--model.schedule", "ConstantWithWarmup", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "999",
        "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1", "--trainer.strategy", "FSDP2",
        "--trainer.devices", str(ranks), "--trainer.strategy.timeout", f"0:00:{TIMEOUT}",
        "--trainer.default_root_dir", str(root), *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_node_that_is_killed_is_named_and_the_run_goes_on_on_one_two_and_three_processes(tmp_path: Path) -> None:
    if not processes.can_two_hosts():
        pytest.skip("two network hosts need root, iproute2 and shared/tools/two-nodes.sh")
    base = processes.make(tmp_path / "base")
    slow = [
        "--model.loss",
        "failing_losses.Slow",
        "--checkpoint.every_n_train_steps",
        "3",
        "--checkpoint.save_top_k",
        "-1",
    ]
    command = [
        *FIT,
        *options(base, tmp_path / "lost", 1, "--trainer.num_nodes", "2", *slow, "--trainer.max_steps", "900"),
    ]
    both = subprocess.Popen(
        ["bash", str(processes.TWO_NODES), "-n", "1", "-t", "1200", "--", *command],
        cwd=tmp_path, env=processes.environment() | {"PYTHON": sys.executable},
    )  # fmt: skip
    first = tmp_path / "node0.log"
    try:
        until(lambda: re.search(r"step 7\b", first.read_text() if first.exists() else ""), 600, first)
        spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
        second = next(name for name in spaces if name == f"node{both.pid}-1")
        pids = subprocess.run(
            ["ip", "netns", "pids", second], capture_output=True, text=True, check=True
        ).stdout.split()
        assert pids
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: "error: " in first.read_text(), TIMEOUT + 60, first)
        print(f"said after {time.monotonic() - killed:.1f} s")
        assert both.wait(180) != 0
    finally:
        both.terminate()
    said = [line for line in first.read_text().splitlines() if line.startswith("error: ")]
    print(said)
    (line,) = said
    assert re.match(rf"error: no sign of life from rank 1 \(\S+, 10\.77\.0\.2\) for {TIMEOUT} s\. This run ends", line)

    checkpoints = sorted((tmp_path / "lost").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    saved = next(path for path in reversed(checkpoints) if not path.is_symlink() and (path / INDEX_CHECKSUM).is_file())
    step = int(saved.stem.rpartition("=")[2])
    plain = ["--model.loss.beta", "0.5", "--trainer.max_steps", str(step + 5), "--trainer.strategy.timeout", "0:05:00"]
    fits = {"whole": (1, 12, plain)}
    fits |= {f"on-{n}": (n, 12 // n, [*plain, "--ckpt_path", str(saved)]) for n in (1, 2, 3)}
    for name, (ranks, size, more) in fits.items():
        arguments = options(base, tmp_path / name, ranks, *more, batch_size=size)
        done = subprocess.run(
            [sys.executable, *FIT, *arguments], cwd=tmp_path, env=processes.environment(),
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    whole = hf(tmp_path / "whole")
    for ranks in (1, 2, 3):
        for key, value in hf(tmp_path / f"on-{ranks}").items():
            torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-5, msg=f"{ranks}: {key}")


def hf(root: Path) -> dict[str, torch.Tensor]:
    (folder,) = root.rglob("hf")
    return dict(read_tensors(folder))


def until(happened: Any, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, log.read_text()[-3000:] if log.exists() else "nothing was said"
        time.sleep(0.1)
