"""Inspecting and relabelling scored pairs: ours against the straight `datasets.map` way, each in a process of its own.

    python benchmarks/relabelling.py --source my-pairs.parquet [--rounds 3]

The peer does what the paper's script does: two maps over the rows that write the goal into a system message and, for
the second one, exchange the responses; then both are joined and written as parquet. It checks nothing. Ours reads,
checks, drops and counts what can't be used, relabels and writes parquet. Prints process CPU seconds without start-up,
pairs per second of CPU, and peak memory; one core each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOAL = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the following target "
    "scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: {:g}."
)


def main() -> None:
    """Run the sides in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=["map", "view", "inspect", "relabel"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(globals()[f"side_{options.side}"](options.source)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            found[side].append(_run(side, options.source))
    print("| side | pairs | CPU s (median) | pairs/s of CPU | peak memory MB |\n|---|---:|---:|---:|---:|")
    for side, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak_mb"] for run in runs)
        pairs = runs[0]["pairs"]
        print(f"| {side} | {pairs:,.0f} | {seconds:.1f} | {pairs / seconds:,.0f} | {peak:,.0f} |")
    if "map" in found:
        for side in found:
            if side != "map":
                ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["map"], found[side], strict=True)]
                print(f"map / {side}: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


def _run(side: str, source: str) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, __file__, "--source", source, "--side", side]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _measured(start: float, pairs: int) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.process_time() - start, "pairs": pairs, "peak_mb": peak}


def _one_core() -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def side_map(source: str) -> dict[str, float]:
    """The paper's way."""
    import datasets

    _one_core()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=folder)
        start = time.process_time()  # loading is not counted for the peer
        halves = [rows.map(_conditioned, fn_kwargs={"swap": swap}, remove_columns=rows.column_names) for swap in (0, 1)]
        both = datasets.concatenate_datasets(halves)
        both.to_parquet(str(Path(folder) / "out.parquet"))
        return _measured(start, len(rows))


def _conditioned(row: dict[str, Any], swap: int) -> dict[str, Any]:
    sides = ("rejected", "chosen") if swap else ("chosen", "rejected")
    goal = {"role": "system", "content": GOAL.format(row[f"score_{sides[0]}"])}
    return {
        "prompt": [goal, *row["chosen"][:-1]], "chosen": row[sides[0]][-1:], "rejected": row[sides[1]][-1:],
        "score_chosen": row[f"score_{sides[0]}"], "score_rejected": row[f"score_{sides[1]}"],
    }  # fmt: skip


def side_view(source: str) -> dict[str, float]:
    """Relabelling alone, of pairs that were read before; nothing is written."""
    from rap_lightning.preferences.data_report import DataReport
    from rap_lightning.preferences.read_pairs import read_pairs
    from rap_lightning.preferences.relabelling import RelabelledView
    from rap_lightning.preferences.rules import Rules
    from rap_lightning.preferences.sources import Source

    _one_core()
    rules = Rules()
    pairs = list(read_pairs(Source(source), "train", rules, DataReport(source, "train"), progress=False))
    start = time.process_time()
    for _ in RelabelledView(pairs, rules.goal, rules.relabelling):
        pass
    return _measured(start, len(pairs))


def side_inspect(source: str) -> dict[str, float]:
    """The whole command, output not shown."""
    import contextlib
    import io

    from rap_lightning.commands.inspect import inspect

    _one_core()
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        inspect(source, json=True)
    return _measured(start, json.loads(said.getvalue())["splits"][0]["pairs_kept"])


def side_relabel(source: str) -> dict[str, float]:
    """The whole command: read, check, relabel, write."""
    import contextlib
    import io

    import pyarrow.parquet as pq

    from rap_lightning.commands.relabel import relabel

    _one_core()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        relabel(source, f"{folder}/out")
        result = _measured(start, 0)
        result["pairs"] = sum(pq.read_metadata(path).num_rows for path in Path(folder).glob("out/*.parquet")) // 2
    return result


if __name__ == "__main__":
    main()
