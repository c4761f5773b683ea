"""What happens to a run when something breaks, and what is lost: a table.

python benchmarks/faults.py --work /tmp/faults     # as root, which alone can make a small disk

Each fault is met by real runs of the command line on a tiny model; "lost" compares, bit for bit, weights, optimizer,
schedule and random numbers after the last step with those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import kills

STEPS, COMBINATION = 8, ("tree", "table", 0, "full")


class BreakWeight(pl.Callback):
    """Makes one weight NaN before step 4."""

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            import torch

            with torch.no_grad():
                module.policy.causal_lm.model.layers[0].mlp.up_proj.weight[2, 7] = math.nan


def child(arguments: list[str], log: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    kills.command(arguments, log)


class Bench:
    """Runs of the command line below one folder."""

    def __init__(self, work: Path) -> None:
        self.work, self.context, self.number = work, kills.server(), 0
        self.world = kills.make(work)
        self.expected = self.whole(self.arguments("whole"))

    def arguments(self, name: str, combination: Any = COMBINATION, data: Path | None = None) -> list[str]:
        made = kills.arguments(data or self.world, self.work / name, combination, STEPS)
        made[made.index("--model.policy.path") + 1] = str(self.world / "base")
        return made

    def start(self, arguments: list[str]) -> tuple[Any, Path]:
        self.number += 1
        log = self.work / f"{self.number}.log"
        process = self.context.Process(target=child, args=(arguments, str(log)))
        process.start()
        return process, log

    def call(self, arguments: list[str]) -> tuple[int, str]:
        process, log = self.start(arguments)
        process.join(200)
        return process.exitcode, log.read_text()

    def whole(self, arguments: list[str]) -> str:
        code, said = self.call(arguments)
        assert code == 0, said
        last = max(n for n, one in enumerate(arguments) if one == "--trainer.default_root_dir")
        found = kills.outcome(Path(arguments[last + 1]), STEPS)
        assert found, said
        return found

    def verdict(self, code: int, found: str, expected: str | None = None) -> str:
        same = found and found == (expected or self.expected)
        return "nothing: it ends bit for bit as without the fault" if code == 0 and same else "THE END IS ANOTHER"


def line(said: str, pattern: str) -> str:
    """The line that has it, shortened paths."""
    (found, *_) = [one for one in said.splitlines() if re.search(pattern, one)] or ["NO SUCH MESSAGE"]
    found = re.sub(r"^\S+\.py:\d+: ", "", found)  # where Python says a warning comes from
    return re.sub(r"\S*/(?=[^/\s]+\.(ckpt|jsonl|partial))", "", found).replace("|", "/")[:420]


def disk(bench: Bench) -> tuple[str, str]:
    place = bench.work / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)], check=True)
    try:
        arguments = [*bench.arguments("disk-run"), "--checkpoint.dirpath", str(place / "saved")]
        process, log = bench.start(arguments)
        end = time.monotonic() + 60
        while not list(place.rglob("*step=3.ckpt")) and time.monotonic() < end:
            time.sleep(0.005)
        with (place / "filler").open("wb") as file:  # someone else fills the disk
            try:
                while True:
                    file.write(bytes(65536))
            except OSError:
                pass
        process.join(100)
        said = log.read_text()
        rescued = kills.checkpoints(bench.work / "disk-run")
        same = rescued and kills.outcome(bench.work / "disk-run", STEPS) == bench.expected
        kept = [path.name for path in kills.checkpoints(place)]
        happened = (
            f"{line(said, 'Training goes on')} At the end: {line(said, 'instead')} On the full disk stands {kept}."
        )
        return happened, "nothing: the rescued checkpoint is the end, bit for bit" if same else "THE END IS ANOTHER"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def flipped(bench: Bench) -> tuple[str, str]:
    arguments = [
        *bench.arguments("flipped"), "--checkpoint.save_top_k", "3", "--checkpoint.monitor", "step",
        "--checkpoint.mode", "max",
    ]  # fmt: skip
    bench.call([*arguments, "--trainer.max_steps", "6", "--model.schedule", "ConstantWithWarmup"])
    newest = kills.checkpoints(bench.work / "flipped")[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    named = [*arguments[: arguments.index("--ckpt_path")], "--ckpt_path", str(newest)]
    code, refused = bench.call([*named, "--model.schedule", "ConstantWithWarmup"])
    expected = bench.whole([*bench.arguments("flat"), "--model.schedule", "ConstantWithWarmup"])
    code, said = bench.call([*arguments, "--model.schedule", "ConstantWithWarmup"])
    happened = f"{line(refused, 'is refused')} With `last`: {line(said, 'passed over')} {line(said, 'ckpt_path last:')}"
    return happened, bench.verdict(code, kills.outcome(bench.work / "flipped", STEPS), expected)


def shard(bench: Bench) -> tuple[str, str]:
    folder = bench.work / "shards"
    folder.mkdir(exist_ok=True)
    rows = (bench.world / "train.jsonl").read_text().splitlines(keepends=True)
    for number in range(3):
        (folder / f"train-{number}.jsonl").write_text("".join(rows[20 * number :][:20]))
    combination = ("tree", "stream", 2, "full")
    arguments = [*bench.arguments("shard", combination, folder), "--data.shuffle_buffer", "1"]
    arguments += ["--trainer.limit_val_batches", "0"]
    expected = bench.whole([*arguments, "--trainer.default_root_dir", str(bench.work / "shard-whole")])
    process, log = bench.start(arguments)
    end = time.monotonic() + 60
    while not kills.checkpoints(bench.work / "shard") and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    moved = (folder / "train-1.jsonl").rename(bench.work / "train-1.jsonl")
    process.join(100)
    said = log.read_text()
    moved.rename(folder / "train-1.jsonl")
    code, _ = bench.call(arguments)
    return line(said, "error: "), bench.verdict(code, kills.outcome(bench.work / "shard", STEPS), expected)


def score(bench: Bench) -> tuple[str, str]:
    folder = bench.work / "score"
    folder.mkdir(exist_ok=True)
    rows = [json.loads(row) for row in (bench.world / "train.jsonl").read_text().splitlines()]
    rest = [dict(row) for row in rows]
    rows[7]["score_chosen"] = math.nan
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without = bench.work / "score-without"
    without.mkdir(exist_ok=True)
    (without / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for n, row in enumerate(rest) if n != 7))
    options = ["--trainer.limit_val_batches", "0"]
    expected = bench.whole([*bench.arguments("score-other", data=without), *options])
    code, said = bench.call([*bench.arguments("score-run", data=folder), *options])
    same = code == 0 and kills.outcome(bench.work / "score-run", STEPS) == expected
    return line(said, "not finite|NaN|nan|number"), (
        "that row: the run is, bit for bit, one on the data without it" if same else "THE END IS ANOTHER"
    )


def weight(bench: Bench) -> tuple[str, str]:
    arguments = bench.arguments("weight")
    code, said = bench.call([*arguments, "--trainer.callbacks", "faults.BreakWeight"])
    happened = f"exit {code}: {line(said, 'error: ')} {line(said, 'to go on')}"
    again, _ = bench.call(arguments)
    return happened, bench.verdict(again, kills.outcome(bench.work / "weight", STEPS))


def sigterm(bench: Bench) -> tuple[str, str]:
    arguments = bench.arguments("sigterm")
    rare = ["--checkpoint.every_n_train_steps", "1000", "--trainer.log_every_n_steps", "1"]
    process, log = bench.start([*arguments, *rare])
    end = time.monotonic() + 60
    while "step 2/" not in (log.read_text() if log.exists() else "") and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    process.join(100)
    said = log.read_text()
    code, _ = bench.call(arguments)
    happened = f"exit {process.exitcode}: {line(said, 'SIGTERM')}; {line(said, 'to go on')}"
    return happened, bench.verdict(code, kills.outcome(bench.work / "sigterm", STEPS))


FAULTS = {
    "disk full during a run": disk,
    "one flipped bit in the newest checkpoint": flipped,
    "a shard of a stream removed": shard,
    "NaN as one row's score": score,
    "NaN in one weight": weight,
    "SIGTERM": sigterm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    a = parser.parse_args()
    shutil.rmtree(a.work, ignore_errors=True)
    a.work.mkdir(parents=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(a.work / "cache")}
    bench = Bench(a.work)
    print("| fault | what happened | what was lost |\n|---|---|---|")
    for name in a.faults:
        happened, lost = FAULTS[name](bench)
        print(f"| {name} | {happened} | {lost} |", flush=True)


if __name__ == "__main__":
    main()
