"""Real processes on this machine: as many as there are, the run is the same; and what is said when one is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, make_model, scored_rows, write_jsonl

WORKER = Path(__file__).with_name("rank_worker.py")
TWO_NODES = ROOT.parent / "shared" / "tools" / "two-nodes.sh"
# a row count that doesn't divide: 46 training pairs in steps of 16, 16 and 14
PAIRS_PER_STEP = 16


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(WORKER.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def start(cases: list[dict[str, Any]], ranks: int, folder: Path) -> None:
    """Fit the cases in ``ranks`` processes, and wait."""
    plan = folder / f"plan-{ranks}-{time.monotonic_ns()}.json"
    plan.write_text(json.dumps(cases))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*launch, str(WORKER), str(plan), str(folder)], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]


def on_two_hosts(cases: list[dict[str, Any]], folder: Path, limit: int = 240) -> None:
    if not TWO_NODES.is_file() or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two network hosts need root, iproute2 and shared/tools/two-nodes.sh")
    plan = folder / "plan-hosts.json"
    plan.write_text(json.dumps(cases))
    done = subprocess.run(
        ["bash", str(TWO_NODES), "-n", "1", "-t", str(limit), "--", str(WORKER), str(plan), str(folder)],
        cwd=folder, env=environment() | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=limit + 30,
    )  # fmt: skip
    logs = "".join(path.read_text()[-2500:] for path in folder.glob("node*.log"))
    assert done.returncode == 0, logs


def assert_same_run(folder: Path, one: str, other: str) -> None:
    """Loss, every metric and the final weights to 1e-5 (log-probabilities relative to their size)."""
    a, b = (torch.load(folder / f"{name}.pt") for name in (one, other))
    assert len(a["rows"]) == len(b["rows"]) > 2
    for row, its in zip(a["rows"], b["rows"], strict=True):
        assert row == pytest.approx(its, rel=1e-5, abs=1e-5)
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        torch.testing.assert_close(b["weights"][name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "pairs").mkdir()
    write_jsonl(folder / "pairs" / "train.jsonl", scored_rows(23))
    write_jsonl(folder / "pairs" / "test.jsonl", scored_rows(9, seed=1))
    model = make_model(folder / "model", tie_word_embeddings=True)
    return {"model": str(model), "data": str(folder / "pairs"), "pairs_per_step": PAIRS_PER_STEP}


def variants(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    kinds = {
        "frozen": ("frozen", False),
        "stored": ("stored", False),
        "off": ("off", True),
        "stored-lora": ("stored", True),
    }
    return {
        f"{layout}-{name}": base | {"reference": reference, "lora": lora, "data_options": {"layout": layout}}
        for layout in ("padded", "tree")
        for name, (reference, lora) in kinds.items()
    }


def test_two_sharded_processes_equal_one(base: dict[str, Any], tmp_path: Path) -> None:
    chosen = {n: c for n, c in variants(base).items() if n in ("tree-frozen", "padded-off")}
    start([c | {"name": f"1-{n}", "ranks": 1, "strategy": "auto"} for n, c in chosen.items()], 1, tmp_path)
    start([c | {"name": f"2-{n}", "ranks": 2, "strategy": "fsdp2"} for n, c in chosen.items()], 2, tmp_path)
    for name in chosen:
        assert_same_run(tmp_path, f"1-{name}", f"2-{name}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_strategy_layout_and_reference_equals_one_process(base: dict[str, Any], tmp_path: Path) -> None:
    all_of_them = variants(base)
    start([c | {"name": f"1-{n}", "ranks": 1, "strategy": "auto"} for n, c in all_of_them.items()], 1, tmp_path)
    two = []
    for name, case in all_of_them.items():
        two += [case | {"name": f"{s}-{name}", "ranks": 2, "strategy": s} for s in ("ddp", "fsdp2")]
    frozen = all_of_them["tree-frozen"] | {"ranks": 2, "strategy": "fsdp2"}
    two += [
        frozen | {"name": "accumulated", "accumulate": 2},
        frozen | {"name": "budget", "data_options": {"layout": "tree", "token_budget": 500}},
        frozen | {"name": "recomputed", "gradient_checkpointing": True},
        frozen | {"name": "offloaded", "strategy_options": {"cpu_offload": True}},
    ]
    start(two, 2, tmp_path)
    start([frozen | {"name": "hsdp", "ranks": 4, "strategy_options": {"shard_size": 2}}], 4, tmp_path)
    for name in all_of_them:
        for strategy in ("ddp", "fsdp2"):
            assert_same_run(tmp_path, f"1-{name}", f"{strategy}-{name}")
    for name in ("accumulated", "budget", "recomputed", "offloaded", "hsdp"):
        assert_same_run(tmp_path, "1-tree-frozen", name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_equal_one_process(base: dict[str, Any], tmp_path: Path) -> None:
    chosen = {n: c for n, c in variants(base).items() if n in ("tree-frozen", "padded-off", "tree-stored")}
    hosts = [
        c | {"name": f"{s}-{n}", "ranks": 2, "nodes": 2, "strategy": s}
        for n, c in chosen.items()
        for s in ("ddp", "fsdp2")
    ]
    on_two_hosts(hosts, tmp_path)
    start([c | {"name": f"1-{n}", "ranks": 1, "strategy": "auto"} for n, c in chosen.items()], 1, tmp_path)
    for name in chosen:
        for strategy in ("ddp", "fsdp2"):
            assert_same_run(tmp_path, f"1-{name}", f"{strategy}-{name}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_resumes_on_one_two_and_three_processes(base: dict[str, Any], tmp_path: Path) -> None:
    for lora in (False, True):
        kind = variants(base)["tree-off" if lora else "tree-frozen"] | {"strategy": "fsdp2", "pairs_per_step": 12}
        every = {"max_epochs": 2}
        folder = str(tmp_path / f"saved-{lora}")
        start([kind | {"name": f"whole-{lora}", "ranks": 2, "trainer": every, "save": folder}], 2, tmp_path)
        saved = f"{folder}/step=2.ckpt"  # within the first epoch of four steps
        whole = torch.load(tmp_path / f"whole-{lora}.pt")
        for ranks in (1, 2, 3):
            name = f"on-{ranks}-{lora}"
            accumulate = 2 if ranks == 1 else 1  # other batches, the same steps
            go_on = {"name": name, "ranks": ranks, "ckpt_path": saved, "trainer": every, "accumulate": accumulate}
            start([kind | go_on], ranks, tmp_path)
            resumed = torch.load(tmp_path / f"{name}.pt")
            assert resumed["rows"][-1]["step"] == whole["rows"][-1]["step"] == 8
            for key, value in whole["weights"].items():
                torch.testing.assert_close(resumed["weights"][key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
