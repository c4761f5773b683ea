"""The same run on one process, on two, on two hosts, under every strategy that runs without a GPU: how far apart.

python benchmarks/processes.py --work /tmp/processes

Real processes over gloo, on a tiny model in float32: 23 scored pairs make 46 training pairs, in steps of 16, 16 and 14,
so that the last step divides neither by the ranks nor by the batches. Every figure is the largest difference from the
run on one process, of all logged metrics of all steps (training and validation) and of all final weights, as a share of
the value where that is larger than 1. Two hosts are two network namespaces of this machine (--two-nodes SCRIPT).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
WORKER = TESTS / "rank_worker.py"
TWO_NODES = ROOT.parent / "shared" / "tools" / "two-nodes.sh"
RESULTS = Path(__file__).with_name("results") / "processes.md"
PAIRS_PER_STEP = 16
REFERENCES = {"frozen": False, "stored": False, "off": True, "stored-lora": True}  # and whether an adapter is trained
LAYOUTS = ("padded", "tree")
STRATEGIES = {
    "2 x DDP": {"strategy": "ddp", "ranks": 2},
    "2 x FSDP2": {"strategy": "fsdp2", "ranks": 2},
    "2 hosts DDP": {"strategy": "ddp", "ranks": 2, "nodes": 2},
    "2 hosts FSDP2": {"strategy": "fsdp2", "ranks": 2, "nodes": 2},
}
MORE: dict[str, dict[str, Any]] = {
    "2 x ModelParallelStrategy": {"ranks": 2, "strategy": "model-parallel"},
    "3 x DDP, packed, steps of 15": {
        "ranks": 3, "strategy": "ddp", "pairs_per_step": 15, "data_options": {"layout": "packed"},
    },
    "2 x FSDP2, accumulate 2": {"ranks": 2, "strategy": "fsdp2", "accumulate": 2},
    "2 x FSDP2, token budget": {
        "ranks": 2, "strategy": "fsdp2", "data_options": {"layout": "tree", "token_budget": 500},
    },
    "2 x DDP, token budget": {
        "ranks": 2, "strategy": "ddp", "data_options": {"layout": "tree", "token_budget": 500},
    },
    "2 x FSDP2, recomputed": {"ranks": 2, "strategy": "fsdp2", "gradient_checkpointing": True},
    "2 x FSDP2, offloaded": {"ranks": 2, "strategy": "fsdp2", "strategy_options": {"cpu_offload": True}},
    "HSDP 2 x 1": {"ranks": 2, "strategy": "fsdp2", "strategy_options": {"shard_size": 1}},
    "HSDP 1 x 2": {"ranks": 2, "strategy": "fsdp2", "strategy_options": {"shard_size": 2}},
    "HSDP 2 x 2": {"ranks": 4, "strategy": "fsdp2", "strategy_options": {"shard_size": 2}},
}  # fmt: skip


def make(folder: Path) -> dict[str, Any]:
    """The model and the data, as a case that others are made of."""
    from conftest import make_model, scored_rows, write_jsonl

    (folder / "pairs").mkdir(parents=True)
    write_jsonl(folder / "pairs" / "train.jsonl", scored_rows(23))
    write_jsonl(folder / "pairs" / "test.jsonl", scored_rows(9, seed=1))
    tied, apart = (make_model(folder / f"tied-{tie}", tie_word_embeddings=tie) for tie in (True, False))
    return {"model": str(tied), "untied": str(apart), "data": str(folder / "pairs"), "pairs_per_step": PAIRS_PER_STEP}


def variants(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every layout with every reference."""
    return {
        f"{layout}-{name}": base
        | {"reference": name.partition("-")[0], "lora": lora, "data_options": {"layout": layout}}
        for layout in LAYOUTS
        for name, lora in REFERENCES.items()
    }


def alone(case: dict[str, Any], name: str) -> dict[str, Any]:
    """The case on one process, with nothing that belongs to many."""
    plain = {key: case[key] for key in case if key in ("model", "data", "pairs_per_step", "reference", "lora")}
    layout = {"data_options": {"layout": case["data_options"]["layout"]}}
    return plain | layout | {"name": name, "ranks": 1, "strategy": "auto"}


def environment() -> dict[str, str]:
    path = [str(TESTS), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def start(cases: list[dict[str, Any]], ranks: int, folder: Path, limit: int = 1500) -> None:
    """Fit the cases one after another in ``ranks`` processes, and wait."""
    if not cases:
        return
    plan = folder / f"plan-{ranks}-{time.monotonic_ns()}.json"
    plan.write_text(json.dumps(cases))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*launch, str(WORKER), str(plan), str(folder)], env=environment(), capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stderr[-12000:]


def can_two_hosts(script: Path = TWO_NODES) -> bool:
    return script.is_file() and os.geteuid() == 0 and shutil.which("ip") is not None


def on_two_hosts(cases: list[dict[str, Any]], folder: Path, limit: int = 1500, script: Path = TWO_NODES) -> None:
    """The same on two network hosts, a process on each."""
    if not cases:
        return
    plan = folder / "plan-hosts.json"
    plan.write_text(json.dumps(cases))
    done = subprocess.run(
        ["bash", str(script), "-n", "1", "-t", str(limit), "--", str(WORKER), str(plan), str(folder)],
        cwd=folder, env=environment() | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=limit + 30,
    )  # fmt: skip
    logs = "".join(path.read_text()[-2500:] for path in folder.glob("node*.log"))
    assert done.returncode == 0, logs


def differences(folder: Path, one: str, other: str) -> dict[str, float]:
    """Of the loss, of all metrics, and of the final weights, as shares of values larger than 1."""
    import torch

    a, b = (torch.load(folder / f"{name}.pt") for name in (one, other))
    assert len(a["rows"]) == len(b["rows"]) > 2
    assert a["weights"].keys() == b["weights"].keys()
    worst = {"loss": 0.0, "metrics": 0.0, "weights": 0.0}
    for row, its in zip(a["rows"], b["rows"], strict=True):
        assert row.keys() == its.keys()
        for name, value in row.items():
            kind = "loss" if name.rpartition("/")[2] == "loss" else "metrics"
            worst[kind] = max(worst[kind], abs(value - its[name]) / max(1.0, abs(value)))
    for name, value in a["weights"].items():
        apart = (value - b["weights"][name]).abs() / value.abs().clamp(min=1.0)
        worst["weights"] = max(worst["weights"], float(apart.max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="of the runs; those that are there aren't run again")
    parser.add_argument("--two-nodes", type=Path, default=TWO_NODES, help="runs torchrun on two network hosts")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    work = options.work
    base = json.loads((work / "base.json").read_text()) if (work / "base.json").is_file() else make(work)
    (work / "base.json").write_text(json.dumps(base))
    all_of_them = variants(base)
    more = {name: all_of_them["tree-frozen"] | case for name, case in MORE.items()}
    hosts = can_two_hosts(options.two_nodes)
    columns = [name for name, case in STRATEGIES.items() if hosts or "nodes" not in case]

    def missing(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [case for case in cases if not (work / f"{case['name']}.pt").is_file()]

    start(missing([alone(case, f"1-{name}") for name, case in (all_of_them | more).items()]), 1, work)
    for ranks in (2, 3, 4):
        cases = [
            case | STRATEGIES[column] | {"name": f"{column}-{name}"}
            for column in columns for name, case in all_of_them.items()
            if "nodes" not in STRATEGIES[column] and ranks == STRATEGIES[column]["ranks"]
        ] + [case | {"name": name} for name, case in more.items() if case["ranks"] == ranks]  # fmt: skip
        start(missing(cases), ranks, work)
        print(f"{ranks} processes: {len(cases)} runs", file=sys.stderr, flush=True)
    if hosts:
        of_hosts = [column for column in columns if "nodes" in STRATEGIES[column]]
        cases = [case | STRATEGIES[c] | {"name": f"{c}-{name}"} for c in of_hosts for name, case in all_of_them.items()]
        on_two_hosts(missing(cases), work, script=options.two_nodes)

    def figures(one: str, other: str) -> str:
        return " / ".join(f"{value:.0e}" for value in differences(work, one, other).values())

    lines = [
        "# One process, two processes, two hosts: largest differences", "",
        *(__doc__ or "").strip().splitlines()[4:], "",
        "Loss / metrics / weights:", "",
        f"| layout and reference | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name} | {' | '.join(figures(f'1-{name}', f'{column}-{name}') for column in columns)} |"
            for name in all_of_them
        ), "",
        "Tree and Frozen:", "", "| run | loss / metrics / weights |", "|---|---|",
        *(f"| {name} | {figures(f'1-{name}', name)} |" for name in more), "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
