"""Ranks that can't run together: a clear message, once on each node, within the time-out."""

import json
import os
import re
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cli_process import RankPair, free_port
from conftest import ROOT, read_jsonl, write_jsonl
from rap_lightning.distributed.rank_monitor import RankMonitor, RankStore
from rap_lightning.errors import DataError
from test_ranks import arguments

pytestmark = pytest.mark.timeout(900)
OVERLAYS = ROOT / "configs" / "strategy"
FSDP2 = ["--trainer.strategy", "FSDP2", "--trainer.strategy.timeout", "0:00:12"]
DDP = [
    "--trainer.strategy", "DDPStrategy", "--trainer.strategy.process_group_backend", "gloo",
    "--trainer.strategy.timeout", "0:00:12",
]  # fmt: skip


def errors(said: str) -> list[str]:
    return re.findall(r"^error: .*", said, re.MULTILINE)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("strategy", [DDP, pytest.param(FSDP2, marks=SLOW)], ids=["ddp", "fsdp2"])
def test_an_error_of_one_rank_is_told_once_by_rank_zero(
    strategy: list[str], start_process: Any, world: Path, tmp_path: Path
) -> None:
    run = RankPair(start_process, arguments(world, tmp_path / "run", "--model.loss", "failing_losses.OnRank"), strategy)
    began = time.monotonic()
    codes = run.end()
    assert time.monotonic() - began < 200
    assert 0 not in codes, run.said[-3000:]
    (error,) = errors(run.said)
    assert "error: rank 1 (" in error
    assert "failed: this is rank 1's own" in error
    assert error in run.ranks[0].said
    assert "Traceback" not in run.said


@SLOW
def test_a_stack_is_shown_by_the_rank_that_it_is_of_and_by_no_other(
    start_process: Any, world: Path, tmp_path: Path
) -> None:
    run = RankPair(
        start_process,
        arguments(world, tmp_path / "run", "--model.loss", "failing_losses.OnRank", "--model.loss.plain", "true"),
        DDP,
    )
    codes = run.end()
    assert 0 not in codes, run.said[-3000:]
    assert "Traceback" in run.ranks[1].said
    assert 'KeyError: "this is rank 1\'s own"' in run.ranks[1].said
    assert "Traceback" not in run.ranks[0].said
    (error,) = errors(run.said)
    assert "rank 1 (" in error
    assert "failed: KeyError" in error
    assert error in run.ranks[0].said


@pytest.mark.parametrize("late", [True, pytest.param(False, marks=SLOW)], ids=["config", "data"])
def test_a_node_with_another_config_or_other_data_is_named_before_a_model_is_loaded(
    late: bool, start_process: Any, world: Path, tmp_path: Path
) -> None:
    rows = read_jsonl(world / "train.jsonl")
    rows[3]["score_chosen"], rows[3]["chosen"] = rows[3]["score_chosen"], rows[4]["chosen"]
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "train.jsonl", rows)
    (other / "test.jsonl").write_bytes((world / "test.jsonl").read_bytes())
    own = ["--model.loss.beta", "0.3"] if late else ["--data.source", str(other)]
    run = RankPair(start_process, arguments(world, tmp_path / "run", "--model.loss", "DPO"), DDP, nodes=2, second=own)
    assert run.end() == [2, 2], run.said[-3000:]
    for rank in run.ranks:  # each node has its own log
        (error,) = errors(rank.said)
        assert re.search(
            rf"rank 1 \(\S+, \S+\): {'config' if late else 'data'} differs from rank 0 \(\S+, \S+\) in ", error
        )
        assert ("model.loss.beta (0.3 vs 0.1)" if late else "data of split train (") in error
        assert "Start all ranks with the same command, config, data" in error
        assert "policy:" not in rank.said, "no model is loaded"


def test_hosts_that_would_write_shards_to_disks_of_their_own_are_refused_before_a_model_is_loaded(
    start_process: Any, world: Path, tmp_path: Path
) -> None:
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        host.mkdir()
    run = RankPair(start_process, arguments(world, Path("runs")), FSDP2, nodes=2, apart=hosts)
    assert run.end() == [2, 2], run.said[-3000:]
    for rank in run.ranks:
        (error,) = errors(rank.said)
        assert re.search(
            r"rank 1 \(\S+\) cannot see what rank 0 \(\S+\) writes to \S+/runs/version_0/checkpoints\.", error
        )
        assert "all hosts must share it on one file system" in error
        assert "policy:" not in rank.said, "no model is loaded"
    assert not list(hosts[0].rglob(".seen-by-all-*")), "the probe is taken away"


@SLOW
def test_a_node_that_never_comes_is_named_by_those_that_did(start_process: Any, world: Path, tmp_path: Path) -> None:
    run = RankPair(start_process, arguments(world, tmp_path / "run"), DDP, nodes=2, alone=0)
    began = time.monotonic()
    assert run.ranks[0].end() == 2, run.said[-3000:]
    assert time.monotonic() - began < 150, "the time-out is 12 s"
    (error,) = errors(run.said)
    assert "1 of 2 ranks answered within 12 s; missing: rank 1." in error
    other = RankPair(start_process, arguments(world, tmp_path / "run"), DDP, nodes=2, alone=1)
    assert other.ranks[0].end() == 2, other.said[-3000:]
    assert re.search(r"rank 1 \(\S+\): timed out after 12 s connecting to localhost:\d+", other.said)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=SLOW), 1])
def test_a_node_that_is_lost_is_named_by_the_other(lost: int, start_process: Any, world: Path, tmp_path: Path) -> None:
    many = arguments(world, tmp_path / "run", "--trainer.max_epochs", "999", steps=100_000)
    run = RankPair(start_process, many, FSDP2, nodes=2)
    run.ranks[0].wait_for("step 2/")
    os.kill(run.ranks[lost].process.pid, signal.SIGKILL)
    began = time.monotonic()
    assert run.ranks[1 - lost].end() == 3, run.said[-3000:]
    assert time.monotonic() - began < 150, "the time-out is 12 s"
    (error,) = errors(run.said)
    assert f"rank {lost} (" in error
    assert "to resume it, pass its newest checkpoint as --ckpt_path" in error


@SLOW
def test_a_rank_that_hangs_is_named(start_process: Any, world: Path, tmp_path: Path) -> None:
    many = arguments(world, tmp_path / "run", "--trainer.max_epochs", "999", steps=100_000)
    run = RankPair(start_process, many, DDP)
    run.ranks[0].wait_for("step 2/")
    os.kill(run.ranks[1].process.pid, signal.SIGSTOP)
    assert run.ranks[0].end() == 3, run.said[-3000:]
    assert "error: no sign of life from rank 1 (" in run.said


@pytest.mark.parametrize("streaming", ["false", pytest.param("true", marks=SLOW)])
def test_more_ranks_than_pairs_are_refused(streaming: str, start_process: Any, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [json.loads((world / "train.jsonl").read_text().splitlines()[0])])
    few = ["--data.source", str(folder), "--data.relabel", "chosen", "--data.streaming", streaming]
    run = RankPair(start_process, arguments(world, tmp_path / "run", *few), DDP)
    assert run.end() == [2, 2], run.said[-3000:]
    (error,) = errors(run.said)
    assert "has 1 training pairs for 2 processes" in error
    assert error in run.ranks[0].said


def two_stores(nodes: int) -> list[RankStore]:
    """Of two ranks in this process, as on one node or two."""
    port, stores = free_port(), []
    for rank in range(2):
        place = {"global_rank": rank, "local_rank": 0 if nodes == 2 else rank, "node_rank": rank if nodes == 2 else 0}
        environment = SimpleNamespace(**{name: lambda value=value: value for name, value in place.items()})
        environment.main_address, environment.main_port = "localhost", port
        stores.append(RankStore(environment, 2, 20))
    return stores


@pytest.mark.parametrize("second", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
def test_ranks_with_different_gpus_are_named_once(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H100 80GB HBM3", second]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monitors = [RankMonitor(end=lambda code: None) for _ in names]
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("always")
        list(pool.map(RankMonitor.begin, monitors, two_stores(1)))
    said = [str(one.message) for one in caught if "different devices" in str(one.message)]
    if second == names[0]:
        assert said == []
        return
    (text,) = said
    assert re.match(
        r"ranks have different devices \(NVIDIA H100 80GB HBM3: rank 0 \(.+\); NVIDIA A100-SXM4-80GB: rank 1 ", text
    )
    assert "as long as on the slowest" in text


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_fail_at_once_say_it_once_on_each_node_whichever_was_first(
    same: bool, nodes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 is first by a moment: shorter than the time in which rank zero's watch would hear of it."""
    stores = two_stores(nodes)
    monitors = [RankMonitor(end=lambda code: None) for _ in stores]
    ended = {}

    def leave(rank: int, error: Exception) -> None:
        try:
            with monitors[rank].reporting():
                raise error
        except BaseException as left:
            ended[rank] = left

    errors_of = [DataError("nothing in it"), DataError("nothing in it") if same else DataError("something else")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(RankMonitor.begin, monitors, stores))
        second = pool.submit(leave, 1, errors_of[1])
        time.sleep(0.3)
        leave(0, errors_of[0])
        second.result(60)
    said = errors(capfd.readouterr().err)
    assert len(said) == nodes
    expected = "nothing in it" if same else "something else"
    assert all(expected in line for line in said), "the first error, also on the other node"
    assert [type(ended[rank]) for rank in (0, 1)] == [SystemExit, SystemExit]


def test_strategies_that_dont_fit_are_refused_before_a_process_is_started(
    start_process: Any, world: Path, tmp_path: Path
) -> None:
    def refusal(*more: str) -> str:
        run = start_process([*arguments(world, tmp_path / "run"), *more])
        assert run.end() == 2, run.said[-2000:]
        (error,) = errors(run.said)
        assert "Traceback" not in run.said
        return error

    cpu = ["-c", str(OVERLAYS / "cpu-fsdp2.yaml")]
    assert "shard_size 3 doesn't divide the 2 processes" in refusal(*cpu, "--trainer.strategy.shard_size", "3")
    sizes = ["--trainer.strategy.data_parallel_size", "3", "--trainer.strategy.tensor_parallel_size", "1"]
    own = refusal("--trainer.devices", "2", "--trainer.strategy", "ModelParallelStrategy", *sizes)
    assert "data_parallel_size 3 times tensor_parallel_size 1 isn't the 2 processes" in own
    unknown = refusal("--trainer.strategy", "fsdp3")
    assert "--trainer.strategy fsdp3: no such strategy. Did you mean fsdp2?" in unknown
    for first in ("fsdp", "FSDPStrategy"):
        assert "torch's first FSDP" in refusal("--trainer.strategy", first)
    for overlay in ("ddp", "fsdp2", "hsdp", "fsdp2-offload", "single"):
        error = refusal("--trainer.accelerator", "gpu", "-c", str(OVERLAYS / f"{overlay}.yaml"))
        assert "no GPU" in error
        assert "cpu-fsdp2.yaml" in error
