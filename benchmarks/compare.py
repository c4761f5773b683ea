"""rap-lightning against TRL on the same rows; prints the table and writes it to benchmarks/results.

python benchmarks/compare.py --model MODEL --data alpaca=rows.jsonl --pairs 2 4

Every measurement is a process of its own. In each round all methods take their turn on the same batches, and each round
takes new ones; the figure is the median, over batches, of TRL's time divided by ours on the same batch. The losses
and log-probabilities of both sides are printed batch by batch: equal work is shown, not promised.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WARM_UP = 1
"""Steps at the beginning of each process that are not counted: they make Adam's state, and touch memory first."""
HERE = Path(__file__).resolve().parent
OURS = {"tree": ["ours.py"], "tree, passes as long as the longest pair": ["ours.py", "--token-budget", "0"]}
PEERS = {
    "TRL, live reference": ["peer_trl.py"],
    "TRL, precomputed": ["peer_trl.py", "--precompute"],
    "TRL, precomputed, CUDA's head path forced": ["peer_trl.py", "--precompute", "--compact-head"],
}
LORA = {
    "ours": {"tree": ["ours.py", "--reference", "stored"]},
    "peers": {k: PEERS[k] for k in ("TRL, live reference", "TRL, precomputed")},
}


def run(command: list[str], a: argparse.Namespace) -> dict[str, Any]:
    """The JSON that a side prints last."""
    full = [*shlex.split(a.run_with), sys.executable, str(HERE / command[0]), *command[1:]]
    done = subprocess.run(full, capture_output=True, text=True, timeout=a.seconds, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{shlex.join(full)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    methods: dict[str, list[str]], common: list[str], pairs: int, a: argparse.Namespace
) -> dict[str, list[Any]]:
    """What each method gave in each round, in turn."""
    found: dict[str, list[Any]] = {name: [] for name in methods}
    for number in range(a.rounds):
        skip = ["--skip", str(number * pairs * a.steps)]
        for name, command in methods.items():
            found[name].append(run([*command, *common, *skip], a))
            last = found[name][-1]
            print(f"  round {number + 1}  {name}: cpu {last['cpu']} wall {last['wall']} {last['logs']}", flush=True)
    return found


def flat(results: list[dict[str, Any]], name: str) -> list[Any]:
    """The steps of all rounds, without those that warm a process up."""
    return [value for result in results for value in result[name][WARM_UP:]]


def ratio(peer: list[Any], ours: list[Any], name: str) -> str:
    each = sorted(p / o for p, o in zip(flat(peer, name), flat(ours, name), strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})"


def largest_difference(peer: list[Any], ours: list[Any]) -> str:
    """Of loss and of log-probabilities (relative), on the first batch of each round: later ones follow an update."""
    loss = logps = 0.0
    for p, o in zip(peer, ours, strict=True):
        loss = max(loss, abs(p["logs"][0][0] - o["logs"][0][0]))
        logps = max(logps, *(abs(x / y - 1) for x, y in zip(p["logs"][0][1:], o["logs"][0][1:], strict=True)))
    return f"{loss:.1e} / {logps:.1e}"


def against(name: str, peer: list[Any], ours: list[Any]) -> str:
    """A row of ratios: what the peer takes, in times what ours takes."""
    peak = max(r["peak_gb"] for r in peer) / max(r["peak_gb"] for r in ours)
    whole = statistics.median(p["whole"][1] / o["whole"][1] for p, o in zip(peer, ours, strict=True))
    times = f"{ratio(peer, ours, 'cpu')} | {ratio(peer, ours, 'wall')} | {peak:.1f} | {whole:.2f}"
    return f"| {name} | {times} | {largest_difference(peer, ours)} |"


def report(title: str, found: dict[str, list[Any]], ours: list[str], peers: list[str]) -> list[str]:
    """The table of one setting, every peer against each of ours."""
    lines = [
        f"### {title}",
        "",
        "| | CPU s per step | wall s per step | tokens laid out | peak GB |",
        "|---|---|---|---|---|",
    ]
    for name, results in found.items():
        cpu, wall = (statistics.median(flat(results, key)) for key in ("cpu", "wall"))
        laid, peak = sum(flat(results, "tokens_laid")), max(r["peak_gb"] for r in results)
        lines.append(f"| {name} | {cpu:.1f} | {wall:.1f} | {laid:,} | {peak:.1f} |")
    for base in ours:
        lines += ["", f"| times ours ({base}) | CPU | wall | peak | whole run, CPU | step 0: loss / logps |"]
        lines.append("|---|---|---|---|---|---|")
        lines += [against(name, found[name], found[base]) for name in peers]
    return [*lines, ""]


def machine() -> str:
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    import torch
    import transformers
    import trl

    return (
        f"{model} ({platform.machine()}), {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=ROWS.jsonl")
    parser.add_argument("--pairs", nargs="+", type=int, default=[2, 4], help="pairs per optimizer step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="batches per round; the first of them warms up")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--only", nargs="*", help="methods whose name holds one of these words")
    parser.add_argument(
        "--run-with", default="", help="a command to put before each measurement (taskset, nice, flock)"
    )
    parser.add_argument("--seconds", type=float, default=3600, help="limit of a measurement")
    parser.add_argument("--out", default=str(HERE / "results" / "trl.md"))
    a = parser.parse_args()
    ours, peers = (LORA["ours"], LORA["peers"]) if a.lora_rank else (OURS, PEERS)
    methods = ours | peers
    if a.only:
        methods = {n: c for n, c in methods.items() if any(word in n for word in a.only)}
    lines = [f"Machine: {machine()}.", ""]
    for item in a.data:
        name, rows = item.split("=", 1)
        for pairs in a.pairs:
            title = f"{name}, {pairs} pairs a step" + (f", LoRA rank {a.lora_rank}" if a.lora_rank else "")
            print(title, flush=True)
            common = ["--model", a.model, "--rows", rows, "--pairs-per-step", str(pairs), "--steps", str(a.steps)]
            common += ["--max-length", str(a.max_length), "--lora-rank", str(a.lora_rank)]
            found = measure(methods, common, pairs, a)
            lines += report(title, found, [n for n in ours if n in methods], [n for n in peers if n in methods])
            Path(a.out).write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
