"""Checkpoints of shards: a folder that this run can't read, and one of which a host kept its part."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.checkpoint import FileSystemWriter, save

from conftest import ROOT, called
from rap_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from rap_lightning.errors import ConfigError
from rap_lightning.models.checkpoint.integrity import INDEX_CHECKSUM, mark_incomplete, verify, write_index_checksum
from rap_lightning.models.checkpoint.open_saved import open_saved
from rap_lightning.models.checkpoint.read_checkpoint import newest_whole, refuse_damaged
from rap_lightning.strategies import FSDP2, check_resumes


def shards(folder: Path, run_key: str = "this") -> Path:
    """What FSDP2 leaves, written by torch, in two files of shards."""
    state = {f"state_dict.policy.{name}": torch.ones(4) for name in ("a", "b")}
    save(state, storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)
    torch.save({"rap_lightning": {"run_key": run_key}}, folder / "meta.pt")
    return folder


def test_only_strategies_that_shard_go_on_from_a_folder(tmp_path: Path) -> None:
    folder = shards(tmp_path / "epoch=0-step=4.ckpt")
    said = rf"{folder} is a sharded checkpoint.*configs/strategy/fsdp2\.yaml.*cpu-fsdp2\.yaml.*--trainer\.devices 1"
    with pytest.raises(ConfigError, match=said):
        check_resumes(SingleDeviceStrategy(), str(folder))
    with pytest.raises(ConfigError, match=said):  # Trainer.fit in Python comes here
        AtomicCheckpointIO().load_checkpoint(folder)
    check_resumes(FSDP2(), str(folder))
    check_resumes(SingleDeviceStrategy(), None)


@pytest.mark.parametrize("given", ["its path", "last"])
def test_fit_without_the_overlay_names_it_before_anything_is_loaded(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rap_lightning.cli import trainer_cli

    monkeypatch.setattr(trainer_cli, "run_key_of", lambda options: "this")
    folder = shards(tmp_path / "runs" / "version_0" / "epoch=0-step=4.ckpt")
    path = str(folder) if given == "its path" else "last"
    options = ["--model.policy.path", "nowhere", "--data.source", "nowhere", "--trainer.accelerator", "cpu"]
    assert called("fit", *options, "--trainer.default_root_dir", str(tmp_path / "runs"), "--ckpt_path", path) == 2
    said = capfd.readouterr().err
    assert f"error: {folder} is a sharded checkpoint, which this run's strategy doesn't read" in said
    assert "-c configs/strategy/fsdp2.yaml (-c configs/strategy/cpu-fsdp2.yaml on CPUs)" in said
    assert "Traceback" not in said


def test_shards_that_lie_on_another_host_are_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "new" / "step=8.ckpt")
    older = shards(tmp_path / "new" / "step=4.ckpt")
    refuse_damaged(folder)
    names = sorted(path.name for path in folder.glob("*.distcp"))
    assert len(names) == 2
    (folder / names[1]).unlink()
    with pytest.raises(ConfigError, match=rf"lacks 1 of its 2 files of shards: {names[1]}\. .*one shared file system"):
        open_saved(folder)
    with pytest.raises(ConfigError, match=rf"The newest whole one there is {older}"):
        refuse_damaged(folder)
    said: list[str] = []
    assert newest_whole(tmp_path, lambda path: path.name == "step=8.ckpt", said.append) is None
    assert any(f"skipping: {folder} lacks 1 of its 2 files" in line for line in said)
    # the other host's folder has parts, and no list of them
    (folder / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"1 files of shards .* but not rank zero's index"):
        open_saved(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no \.metadata \(FSDP2\) or latest \(DeepSpeed\)"):
        refuse_damaged(folder)


def test_a_flipped_bit_in_any_file_of_shards_is_found(tmp_path: Path) -> None:
    folder = shards(tmp_path / "step=4.ckpt")
    assert not verify(folder), "the index has no checksum: nobody finished this checkpoint"
    write_index_checksum(folder)
    assert verify(folder)
    weights = torch.ones(4).numpy().tobytes()
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        places = [whole.index(weights)] if path.suffix == ".distcp" else range(len(whole))
        places = [whole.index(b"run_key")] if path.suffix == ".pt" else places
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 4
            path.write_bytes(changed)
            with pytest.raises(ConfigError, match=r"is refused|can't be read|lacks"):
                refuse_damaged(folder)
        path.write_bytes(whole)
    (folder / INDEX_CHECKSUM).unlink()
    assert not verify(folder)


def test_a_sharded_checkpoint_that_is_written_over_is_incomplete_until_it_is_written(tmp_path: Path) -> None:
    folder = shards(tmp_path / "last.ckpt")
    write_index_checksum(folder)
    mark_incomplete(folder)
    with pytest.raises(ConfigError, match="but not rank zero's index: was saving interrupted"):
        refuse_damaged(folder)


def test_last_says_why_it_takes_none_of_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rap_lightning.cli import trainer_cli

    monkeypatch.setattr(trainer_cli, "run_key_of", lambda options: "this")
    runs = tmp_path / "runs"
    other = shards(runs / "other.ckpt", run_key="another")
    torn = shards(runs / "torn.ckpt")
    sorted(torn.glob("*.distcp"))[0].unlink()
    silent = shards(runs / "silent.ckpt")
    (silent / "meta.pt").unlink()
    options = ["--model.policy.path", "nowhere", "--data.source", "nowhere", "--trainer.accelerator", "cpu"]
    called("fit", *options, "--trainer.default_root_dir", str(runs), "--ckpt_path", "last")
    said = capfd.readouterr().err
    assert f"skipping, of runs with other model, data or seed_everything options than this one: {other}\n" in said
    assert f"skipping: {torn} lacks 1 of its 2 files of shards" in said
    assert f"skipping: {silent} doesn't say which options it was trained with" in said
    assert f"--ckpt_path last: none of the 3 checkpoints below {runs} matches, so this run begins at step 0" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_documented_command_runs_the_quickstart_on_two_nodes_and_what_it_leaves_is_gone_on_from_and_exported(
    tmp_path: Path,
) -> None:
    """launch/torchrun.sh as docs/scaling.md has it, both nodes on this machine and in one folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    programs = {"torchrun": "-m torch.distributed.run", "rap-lightning": "-m rap_lightning.cli.main"}
    for name, module in programs.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        script.chmod(0o755)
    (command,) = {
        line.partition("launch/torchrun.sh ")[2]
        for line in (ROOT / "docs/scaling.md").read_text().splitlines()
        if line.startswith("NODES=2 ")
    }
    small = ["--data.base_steps", "30", "--data.train_pairs", "80", "--data.test_pairs", "20", "--trainer.max_epochs"]
    small += ["1", "--trainer.callbacks", "[]", "--checkpoint.every_n_train_steps", "1"]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    cluster = {"NODES": "2", "MAIN": "localhost", "PORT": str(port), "GPUS": "1"}
    run = [ROOT / "launch/torchrun.sh", *shlex.split(command), *small]
    nodes = [
        subprocess.Popen(
            run, cwd=tmp_path, env=environment | cluster | {"NODE_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)[-4000:]
    assert (tmp_path / "runs/world/base/model.safetensors").is_file()
    (folder,) = (path for path in tmp_path.glob("runs/version_0/checkpoints/*.ckpt") if not path.is_symlink())
    assert folder.is_dir()
    refuse_damaged(folder)
    repeat = json.loads((tmp_path / "runs/version_0/run.json").read_text())["repeat"]
    assert "torchrun --nnodes=2 --nproc_per_node=1 --node_rank=" in repeat
    assert f"--master_addr=localhost --master_port={port} --no-python rap-lightning fit --config" in repeat

    def alone(*options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rap_lightning.cli.main", *map(str, options)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)

    fit = ["fit", "-c", "configs/quickstart.yaml", *small, "--ckpt_path", folder, "--data.batch_size", "64"]
    plain = alone(*fit)
    assert plain.returncode == 2
    assert "is a sharded checkpoint" in plain.stderr
    more = alone(*fit, "-c", "configs/strategy/cpu-fsdp2.yaml", "--trainer.devices", "1", "--trainer.max_epochs", "2")
    assert more.returncode == 0, more.stderr[-3000:]
    assert alone("export", "--checkpoint", folder, "--output", "whole").returncode == 0
    next(folder.glob("__1_*.distcp")).unlink()
    torn = alone("export", "--checkpoint", folder, "--output", "torn")
    assert torn.returncode == 2
    assert "lacks 1 of its 2 files of shards: __1_0.distcp. Rank R writes" in torn.stderr
