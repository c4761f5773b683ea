"""Processes that are killed, told to stop, or requeued, and go on: forked from a server that has imported all."""

import os
import re
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzz
import kills
from conftest import called, scored_rows, write_jsonl
from rap_lightning.models.checkpoint.integrity import verify

FAST = [("tree", "table", 0, "full"), ("packed", "stream", 2, "adapter")]


def combinations() -> list[Any]:
    return [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in kills.COMBINATIONS]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("combination", combinations(), ids=lambda c: "-".join(map(str, c)))
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(
    combination: Any, process_server: Any, world: Path, tmp_path: Path
) -> None:
    import random

    seconds = kills.run(process_server, world, tmp_path / "whole", combination)
    expected = kills.outcome(tmp_path / "whole")
    rng, aimed = random.Random(str(combination)), kills.COMBINATIONS.index(combination) % 2 == 0
    state: dict[str, Any] = {}
    while not state:  # it may be over before it is killed
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        state = kills.killed(process_server, world, tmp_path / "killed", combination, rng, seconds, aimed=aimed)
    kills.run(process_server, world, tmp_path / "killed", combination)
    assert expected
    assert kills.outcome(tmp_path / "killed") == expected, state


def steps_of(root: Path) -> list[int]:
    return [torch.load(path, weights_only=True)["global_step"] for path in kills.checkpoints(root)]


LONG = ["--trainer.max_epochs", "1000", "--trainer.log_every_n_steps", "1"]


def test_sigterm_saves_says_how_to_go_on_and_ends_with_143(start_process: Any, world: Path, tmp_path: Path) -> None:
    arguments = kills.arguments(world, tmp_path / "runs", FAST[0], steps=100_000)
    rare = [*LONG, "--checkpoint.every_n_train_steps", "1000000"]
    run = start_process([*arguments, *rare])
    run.wait_for("step 5/")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == 143
    assert "SIGTERM: saving a checkpoint and stopping" in run.said
    assert "Traceback" not in run.said
    hint = re.search(r"to resume, run the same command with: --ckpt_path (\S+)", run.said)
    assert hint
    assert verify(Path(hint[1]))
    (step,) = steps_of(tmp_path / "runs")
    assert step >= 5
    again = start_process([*arguments, *rare, "--trainer.max_steps", str(step + 2)])
    assert again.end() == 0
    assert f"--ckpt_path last: {hint[1]}" in again.said
    assert f"step {step + 1}/{step + 2}" in again.said
    assert "step 5/" not in again.said


def test_slurm_saves_requeues_and_the_restarted_job_goes_on_by_itself(
    start_process: Any, world: Path, tmp_path: Path
) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path / 'scontrol.log'}\n")
    (bin_ / "scontrol").chmod(0o755 | stat.S_IXUSR)
    slurm = {
        "SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "PATH": f"{bin_}:{os.environ['PATH']}",
    }  # fmt: skip
    arguments = kills.arguments(world, tmp_path / "runs", FAST[0], steps=100_000)
    arguments = arguments[: arguments.index("--ckpt_path")]  # a job script names no checkpoint
    arguments += [*LONG, "--checkpoint.every_n_train_steps", "1000000"]
    run = start_process(arguments, **slurm)
    run.wait_for("step 4/")
    os.kill(run.process.pid, signal.SIGUSR1)
    run.wait_for("Handling auto-requeue signal")
    run.wait_for("Requeued SLURM job|requeing job")
    os.kill(run.process.pid, signal.SIGTERM)  # SLURM ends what it requeues
    assert run.end() == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    requeued = tmp_path / "runs" / "hpc_ckpt_1.ckpt"
    assert verify(requeued)
    step = max(steps_of(tmp_path / "runs"))
    fresh = start_process(arguments, **slurm | {"SLURM_JOB_ID": "78"})
    assert fresh.end() == 2, "another job must not go on from this one's checkpoint without a word"
    assert "was left by another SLURM job" in fresh.said
    again = start_process([*arguments, "--trainer.max_steps", str(step + 2)], **slurm | {"SLURM_RESTART_COUNT": "1"})
    assert again.end() == 0, again.said[-2000:]
    assert "--ckpt_path last: " in again.said
    assert f"step {step + 1}/{step + 2}" in again.said


def test_last_passes_over_damaged_checkpoints_with_a_word(start_process: Any, world: Path, tmp_path: Path) -> None:
    arguments = kills.arguments(world, tmp_path / "runs", FAST[0], steps=4)
    arguments += ["--checkpoint.save_top_k", "3", "--checkpoint.monitor", "step", "--checkpoint.mode", "max"]
    first = start_process(arguments)
    assert first.end() == 0
    assert "no checkpoint below" in first.said
    assert "begins at step 0" in first.said
    saved = kills.checkpoints(tmp_path / "runs")
    assert steps_of(tmp_path / "runs") == [2, 3, 4]
    damaged = bytearray(saved[-1].read_bytes())
    damaged[len(damaged) // 3] ^= 1
    saved[-1].write_bytes(damaged)
    # what saves memory may change on the way, as after a run that had too little
    again = start_process([*arguments, "--trainer.max_steps", "5", "--model.policy.gradient_checkpointing", "true"])
    assert again.end() == 0
    assert f"skipping: {saved[-1]} is refused: its content is not what was written" in again.said
    assert f"--ckpt_path last: {saved[-2]}" in again.said
    other = start_process([*arguments, "--model.loss.beta", "0.7"])
    assert other.end() == 0
    assert re.search(r"skipping, of runs with other model, data or seed_everything options .*: \S+\.ckpt", other.said)
    assert re.search(r"none of the \d checkpoints below \S+ matches, so this run begins at step 0", other.said)


@pytest.mark.parametrize("workers", ["2", pytest.param("0", marks=pytest.mark.slow)])
def test_a_shard_that_goes_away_during_a_run_is_named_and_costs_nothing(
    workers: str, start_process: Any, world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / f"data{workers}"
    folder.mkdir()
    rows = scored_rows(160)
    for number in range(2):
        write_jsonl(folder / f"train-{number}.jsonl", rows[80 * number :][:80])
    gone = folder / "train-1.jsonl"
    arguments = [
        *kills.arguments(world, tmp_path / f"runs{workers}", ("tree", "stream", 0, "full"), steps=30),
        "--data.source", str(folder), "--data.num_workers", workers, "--data.max_length", "512",
        "--data.shuffle_buffer", "1", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0",
        "--checkpoint.every_n_train_steps", "1000",
    ]  # fmt: skip
    run = start_process(arguments)
    run.wait_for("step 2/")
    moved = gone.rename(tmp_path / "elsewhere.jsonl")
    assert run.end() == 2, run.said[-3000:]
    assert re.search(r"error: \S*train-1\.jsonl can't be read: FileNotFoundError", run.said), run.said[-2000:]
    assert "Traceback" not in run.said
    moved.rename(gone)
    again = start_process(arguments)
    assert again.end() == 0
    whole = start_process([*arguments, "--trainer.default_root_dir", str(tmp_path / f"whole{workers}")])
    assert whole.end() == 0
    ends = [kills.outcome(tmp_path / f"{name}{workers}", steps=30) for name in ("runs", "whole")]
    assert ends[0] == ends[1] != ""


def test_a_pickle_with_code_in_it_is_refused_before_anything_loads(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import pickle

    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    arguments = kills.arguments(world, tmp_path / "runs", FAST[0])
    arguments[arguments.index("--ckpt_path") + 1] = str(tmp_path / "old.ckpt")
    assert called(*arguments) == 2
    assert (
        "can't be read as a checkpoint: it is cut off, or of another kind (for example, a pickle)"
        in capfd.readouterr().err
    )


CASES = 16


def fuzzed(work: str, kind: str, numbers: list[int], log: str) -> None:
    """Run cases in a process that may fork."""
    fuzz.preload()
    made = fuzz.prepared(Path(work))
    with Path(log).open("a") as file:
        for number in numbers:
            state = fuzz.one(kind, number, Path(work), made)
            file.write(f"{kind} {number} {state['verdict']} {state['last']}\n")


@pytest.mark.timeout(300)
def test_mutated_configs_and_files_end_in_a_message_or_a_run(process_server: Any, tmp_path: Path) -> None:
    """A sample; benchmarks/fuzz.py has 2,000 of each."""
    for kind in ("config", "file"):
        process = process_server.Process(
            target=fuzzed, args=(str(tmp_path), kind, list(range(CASES // 2)), str(tmp_path / "log"))
        )
        process.start()
        process.join(200)
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == CASES
    assert not [line for line in lines if "wrong" in line]
    assert {line.split()[2] for line in lines} == {"run", "message"}
