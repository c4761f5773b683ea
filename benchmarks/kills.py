"""kill -9 at random moments, resume with the same command, compare with a run that was never killed: bit for bit.

python benchmarks/kills.py --work /tmp/kills --kills 100

Runs are real ones of the command line (``rap-lightning fit ... --ckpt_path last``) on a tiny model, with a checkpoint
after every step, over all combinations of layout, source, data workers and adapter; with --defaults only streams, whose
runs end with the command line's default, one epoch. They are forked from a server that has imported everything, so that
a kill costs seconds. Half of the kills come at a moment drawn from the whole life of the process, half while a
checkpoint is being written. Lines are added to WORK/kills.jsonl; call again to go on, and the table is printed at the
end of each call.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 10
EPOCH, MORE = 14, 40
"""Optimizer steps of one epoch (110 training pairs, 4 to a batch, 2 batches to a step), and more than that."""
COMBINATIONS = list(
    itertools.product(("padded", "packed", "tree"), ("table", "stream"), (0, 2), ("full", "adapter"))
)  # fmt: skip
DEFAULTS = list(itertools.product(("tree",), ("stream",), (0, 2), ("full", "adapter")))


def server() -> Any:
    """What forks processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "rap_lightning.cli.trainer_cli", "transformers.models.llama.modeling_llama", "peft", "datasets",
        "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    ])  # fmt: skip
    first = context.Process(target=os.getpid)  # returns when everything has been imported
    first.start()
    first.join()
    return context


def command(arguments: list[str], log: str) -> None:
    """One process of the command line, its output in a file."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as where the command line is started
    from rap_lightning.cli.main import main

    code = 0
    try:
        sys.argv = ["rap-lightning", *arguments]
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # what multiprocessing does at the end belongs to the fork server, not to the command line


def make(work: Path) -> Path:
    """The embedded world, with a base model that has hardly been trained."""
    from rap_lightning.world import make_world

    make_world(work / "world", train_pairs=60, test_pairs=8, base_steps=2)
    return work / "world"


def arguments(world: Path, root: Path, combination: tuple[str, str, int, str], steps: int | None = STEPS) -> list[str]:
    """The command line of a run: of so many optimizer steps, or None for one epoch, as by default."""
    layout, source, workers, trained = combination
    stream = ["--data.streaming", "true", "--data.shuffle_buffer", "30"]
    adapter = ["--model.policy.lora.r", "4", "--model.policy.lora.dropout", "0.1"]
    return [
        "fit", "--model.policy.path", str(world / "base"), "--data.source", str(world), "--data.max_length", "128",
        "--data.batch_size", "4", "--data.layout", layout, "--data.num_workers", str(workers),
        "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "1e-3",
        "--trainer.accelerator", "cpu", "--trainer.accumulate_grad_batches", "2",
        "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "8", "--trainer.default_root_dir",
        str(root), "--trainer.enable_model_summary", "false", "--checkpoint.every_n_train_steps", "1",
        "--export.enabled", "false", "--ckpt_path", "last", *(stream if source == "stream" else []),
        *(adapter if trained == "adapter" else []), "--trainer.max_steps", str(steps or MORE),
    ]  # fmt: skip


def checkpoints(root: Path) -> list[Path]:
    """Of all runs below a folder, the oldest first."""
    return sorted((p for p in root.rglob("*.ckpt") if not p.is_symlink()), key=lambda p: p.stat().st_mtime)


def outcome(root: Path, steps: int | None = STEPS) -> str:
    """Digest of weights, optimizer, schedule and random numbers after the last step; "" where it wasn't reached."""
    import torch

    saved = [torch.load(path, map_location="cpu", weights_only=True) for path in checkpoints(root)[-1:]]
    if not saved or saved[0]["global_step"] != (steps or EPOCH):
        return ""
    digest = hashlib.sha256()
    content = [
        saved[0]["state_dict"], saved[0]["optimizer_states"], saved[0]["lr_schedulers"],
        [state["torch"] for state in saved[0]["rap_lightning"]["run"]["random"]],
    ]  # fmt: skip
    for leaf in leaves(content):
        digest.update(leaf.contiguous().numpy().tobytes() if torch.is_tensor(leaf) else repr(leaf).encode())
    return digest.hexdigest()


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key in value:
            yield key
            yield from leaves(value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def run(
    context: Any, world: Path, root: Path, combination: Any, steps: int | None = STEPS, limit: float = 300
) -> float:
    """One whole run; its seconds."""
    start = time.perf_counter()
    process = context.Process(target=command, args=(arguments(world, root, combination, steps), str(root) + ".log"))
    process.start()
    process.join(limit)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(
            f"a run of {combination} ended with {process.exitcode}:\n{Path(str(root) + '.log').read_text()}"
        )
    return time.perf_counter() - start


def partials(root: Path) -> list[Path]:
    """Checkpoints that are being written."""
    found = []
    with contextlib.suppress(OSError):
        for folder in root.glob("version_*/checkpoints"):
            found += [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".ckpt.partial")]
    return found


def killed(
    context: Any, world: Path, root: Path, combination: Any, rng: random.Random, seconds: float, *, aimed: bool,
    steps: int | None = STEPS,
) -> dict[str, Any]:  # fmt: skip
    """Start a run and kill it; what state it was in, or {} if it was over before."""
    process = context.Process(target=command, args=(arguments(world, root, combination, steps), str(root) + ".log"))
    process.start()
    wanted, seen, names = rng.randrange(1, steps or EPOCH), 0, set()
    end = time.perf_counter() + (120 if aimed else rng.uniform(0, seconds))
    while process.is_alive() and time.perf_counter() < end:
        if not aimed:
            time.sleep(0.001)
        elif new := {str(path) for path in partials(root)} - names:
            names |= new
            seen += 1
            if seen == wanted:
                time.sleep(rng.uniform(0, 0.004))
                break
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return {}
    writing = bool(partials(root))
    saved = checkpoints(root)
    return {"while": "writing a checkpoint" if writing else "training" if saved else "before the first checkpoint"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100, help="how many there are to be in all")
    parser.add_argument("--minutes", type=float, default=3.0, help="stop after this long; call again to go on")
    parser.add_argument("--defaults", action="store_true", help="streams, one epoch: the command line's defaults")
    a = parser.parse_args()
    if a.defaults:
        a.work /= "defaults"  # its runs are compared with whole runs of their own
    a.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(a.work / "cache")}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context, world, lines = server(), make(a.work), a.work / "kills.jsonl"
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    known = a.work / "whole.json"
    whole: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    combinations, steps = (DEFAULTS, None) if a.defaults else (COMBINATIONS, STEPS)
    deadline = time.perf_counter() + 60 * a.minutes
    for number in range(len(done), a.kills):
        if time.perf_counter() > deadline:
            break
        combination, rng = combinations[number % len(combinations)], random.Random(number)
        name = " ".join(map(str, combination))
        if name not in whole:
            root = a.work / "whole" / name.replace(" ", "-")
            shutil.rmtree(root, ignore_errors=True)
            seconds = run(context, world, root, combination, steps)
            whole[name] = {"digest": outcome(root, steps), "seconds": seconds}
            assert whole[name]["digest"], "the run that is not killed must end"
            known.write_text(json.dumps(whole))
        state: dict[str, Any] = {}
        while not state:
            root = a.work / "killed" / str(number)
            shutil.rmtree(root, ignore_errors=True)
            state = killed(
                context, world, root, combination, rng, whole[name]["seconds"], aimed=number % 2 == 1, steps=steps
            )
        start = time.perf_counter()
        try:
            run(context, world, root, combination, steps)
            state["same"] = outcome(root, steps) == whole[name]["digest"]
        except RuntimeError as error:
            state |= {"same": False, "error": str(error)[-2000:]}
        state |= {"number": number, "combination": name, "seconds": round(time.perf_counter() - start, 1)}
        with lines.open("a") as file:
            file.write(json.dumps(state) + "\n")
        done.append(state)
        if state["same"]:
            shutil.rmtree(root, ignore_errors=True)
        print(number, name, state["while"], "recovered" if state["same"] else "NOT RECOVERED", flush=True)
    print("\n| killed while | kills | recovered, bit for bit |\n|---|---|---|")
    for kind in sorted({state["while"] for state in done}):
        mine = [state for state in done if state["while"] == kind]
        print(f"| {kind} | {len(mine)} | {sum(state['same'] for state in mine)} |")
    print(f"| all | {len(done)} | {sum(state['same'] for state in done)} |")


if __name__ == "__main__":
    main()
