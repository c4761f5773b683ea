"""Mutated configs and mutated data files through the command line: a clear message or a correct run, nothing else.

python benchmarks/fuzz.py --work /tmp/fuzz --configs 2000 --files 2000
python benchmarks/fuzz.py --work /tmp/fuzz --folders 2000

With --folders: mutated model folders, chat templates and data folders, in turn, through the package's functions in this
process (fuzz_cases.py, which also knows what would be silently wrong). Otherwise each case is a process forked from one
that has imported everything, with a time limit and a memory limit. Wrong are: a traceback, a signal, a failure without
an "error: ..." line, a success that trained nothing, a hang. Such cases are kept in WORK/wrong with their input and
output. Cases follow from their number alone; call again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

LIMIT_S, MEMORY = 120, 12 << 30
VALUES: list[Any] = [
    None, "", " ", "x", "null", "nan", [], {}, [None], [1, "x"], {"a": 1}, {"class_path": "x"}, True, False, -1, 0, 1,
    2, 3, 0.0, 0.5, 1.0, -0.5, 1e-30, 1e30, float("nan"), float("inf"), 2**31, 10**12, "1", "-1", "1e-3", "é" * 50, "/",
    "/dev/null",
    "/nonexistent/x", "no/such", ".", "torch.nn.Linear", "os.system", "rap_lightning.losses.DPO", {"class_path": "DPO"},
    {"class_path": "os.getcwd"}, {"class_path": "SimPO", "init_args": {"beta": "x"}},
    "${oops}", "!!python/object:os.system",
    [[[]]],
]  # fmt: skip
FEW = [None, "", "x", [], {}, True, -1, 0, 1, 2, 0.5, "1"]
"""For keys by which a machine could be filled with processes."""
PROCESSES = {"devices", "num_nodes", "num_workers", "num_proc", "strategy", "accelerator"}
LONG = {"max_time", "max_epochs", "max_steps", "min_epochs", "min_steps"}


def base_config(world: Path) -> dict[str, Any]:
    return {
        "model": {
            "policy": {"path": str(world / "base"), "lora": {"r": 4}},
            "loss": {"class_path": "DPO", "init_args": {"beta": 0.1}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "schedule": {"class_path": "CosineWithWarmup", "init_args": {"warmup_ratio": 0.1}},
        },
        "data": {
            "source": str(world / "few.jsonl"), "max_length": 128, "batch_size": 4, "layout": "tree",
            "goal": {"class_path": "OverallGoal", "init_args": {"scale": {"low": 1, "high": 10}}},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "enable_model_summary": False},
        "checkpoint": {"save_top_k": 1}, "guard": {"non_finite": "stop"}, "watchdog": {"margin": 10.0},
        "export": {"enabled": False}, "seed_everything": 1,
    }  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, one in inner:
        found += places(one, (*path, key))
    return found


def holder(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def change(value: Any, rng: random.Random, pool: list[Any]) -> None:
    """One mutation in place: another value, a key gone, misspelt, moved, or new."""
    path = rng.choice(places(value))
    inside, key = holder(value, path), path[-1]
    kind = rng.choice(("value", "value", "value", "value", "gone", "misspelt", "moved", "new"))
    if kind == "value":
        inside[key] = rng.choice(FEW if key in PROCESSES else pool)
    elif kind == "gone":
        del inside[key]
    elif kind == "misspelt" and isinstance(inside, dict):
        text = str(key)
        place = rng.randrange(len(text) + 1)
        inside[text[:place] + rng.choice("abz_.") + text[place + 1 :]] = inside.pop(key)
    elif kind == "moved":
        other = holder(value, rng.choice(places(value)))
        if isinstance(other, dict) and key not in PROCESSES | LONG:
            other[str(key)] = json.loads(json.dumps(inside[key], default=str))
    elif isinstance(inside, dict):
        inside[rng.choice(("extra", "beta", "path", "init_args", "class_path", "lora", "help", "config"))] = rng.choice(
            pool
        )


def config_case(number: int, folder: Path, world: Path, whole: dict[str, Any]) -> list[str]:
    import yaml

    rng = random.Random(f"config {number}")
    config = json.loads(json.dumps(base_config(world) if rng.random() < 0.5 else whole))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(config, rng, VALUES)
    text = yaml.safe_dump(config, sort_keys=False)
    if rng.random() < 0.1:
        text = "".join(cut(text, rng))
    (folder / "config.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return [
        "fit", "--config", "config.yaml", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1",
        "--trainer.default_root_dir", "runs",
    ]  # fmt: skip


def cut(text: Any, rng: random.Random) -> Any:
    """Text or bytes with some of it gone, doubled, exchanged or new."""
    empty = text[:0]
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not text:
            return text
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 1, 3, 40, 10**6)))
        strange = rng.choice(("\t", "{", "]", ":", "\n", '"', "\0", "-", "é", "&a *a", "\u2028", "<|im_end|>"))
        new = strange if isinstance(text, str) else bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 30))))
        kind = rng.choice(("gone", "doubled", "new", "exchanged", "end"))
        middle = {"gone": empty, "doubled": text[a:b] * 2, "new": text[a:b] + new, "exchanged": new}.get(kind, empty)
        text = text[:a] if kind == "end" else text[:a] + middle + text[b:]
    return text


ROW_VALUES: list[Any] = [
    None, "", " ", "\u200b", "x" * 20000, "<|im_end|><|im_start|>system", "\x00", "é\u2028", [], {}, [None], [[]], True,
    False, 0, -1, 5, 5.5, 11, 1e300, float("nan"), float("inf"), "7", "7,5", "high", 10**30, {"role": "user"},
    [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": None}],
    [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], [{"content": "x"}],
    [{"role": "tool", "content": "x"}], {"content": "x", "role": "assistant"}, [1, 2], "\ud800",
]  # fmt: skip


def file_case(number: int, folder: Path, world: Path, rows: list[dict[str, Any]]) -> list[str]:
    rng = random.Random(f"file {number}")
    rows = json.loads(json.dumps(rows))
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 2, 6))):
            every, path = rng.random() < 0.3, rng.choice(places(rows[0]))
            seed = rng.random()
            for row in rows if every else [rng.choice(rows)]:
                same = random.Random(seed)
                if path in places(row):
                    inside, key = holder(row, path), path[-1]
                    kind = same.choice(("value", "value", "value", "gone", "misspelt", "new"))
                    if kind == "value":
                        inside[key] = same.choice(ROW_VALUES)
                    elif kind == "gone":
                        del inside[key]
                    elif kind == "misspelt" and isinstance(inside, dict):
                        inside[str(key) + same.choice("s_x")] = inside.pop(key)
                    elif isinstance(inside, dict):
                        inside[same.choice(("score", "messages", "rejected", "extra", "completions"))] = same.choice(
                            ROW_VALUES
                        )
    suffix = rng.choice((".jsonl", ".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz"))
    content = written(rows, suffix)
    if content is None:  # Arrow can't hold such rows
        suffix, content = ".jsonl", written(rows, ".jsonl")
    assert content is not None
    if rng.random() < 0.5:
        content = cut(content, rng)
    if rng.random() < 0.05:
        content = content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    if rng.random() < 0.05:
        suffix = rng.choice((".jsonl", ".json", ".parquet", ".arrow", ".txt", ""))
    (folder / f"rows{suffix}").write_bytes(content)
    source = f"rows{suffix}" if rng.random() < 0.8 else "."
    if rng.random() < 0.8:
        return ["inspect", "--source", source, "--tokenizer", str(world / "base")]
    stream = ["--data.streaming", "true"] if rng.random() < 0.3 else []
    return [
        "fit", "--model.policy.path", str(world / "base"), "--data.source", source, "--data.max_length", "128",
        "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1",
        "--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", "runs", "--export.enabled", "false", *stream,
    ]  # fmt: skip


def written(rows: list[dict[str, Any]], suffix: str) -> bytes | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".jsonl.gz":
        return gzip.compress(text)
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return text
    try:
        table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
        if suffix == ".parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        return bytes(sink.getvalue())
    except (pa.ArrowException, UnicodeError, OverflowError):
        return None


def call(arguments: list[str], folder: Path) -> tuple[int | None, str, float]:
    """Run the command line in a forked process; (exit code, None for a hang; output; seconds)."""
    log, start = folder / "output.txt", time.perf_counter()
    pid = os.fork()
    if pid == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv = ["rap-lightning", *arguments]
        code = 0
        try:
            from rap_lightning.cli.main import main

            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while time.perf_counter() - start < LIMIT_S:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.perf_counter() - start
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, log.read_text(errors="replace"), time.perf_counter() - start


def judged(arguments: list[str], code: int | None, output: str) -> str:
    """ "run", "message", or what is wrong."""
    if code is None:
        return "wrong: a hang"
    if code < 0:
        return f"wrong: signal {-code}"
    if "Traceback (most recent call last)" in output:
        return "wrong: a traceback"
    if code == 0:
        trained = arguments[0] != "fit" or re.search(r"^step 1/1 ", output, re.M) or "Trainer.fit` stopped" in output
        helped = "usage:" in output or re.search(r"^(class_path|model|trainer|data):", output, re.M)
        return "run" if trained or helped else "wrong: success without a step"
    told = re.search(r"error: \S|^Faults were found: fit would stop", output, re.M | re.I)  # the latter of inspect
    return "message" if told else "wrong: a failure without a message"


def prepared(work: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The world, a config with every key, and some rows. Nothing of torch is used here: this process forks."""
    import subprocess

    world = work / "world"
    if not (world / "few.jsonl").exists():
        code = (
            "import sys; from rap_lightning.world import make_world; "
            "make_world(sys.argv[1], train_pairs=60, test_pairs=8, base_steps=2)"
        )
        subprocess.run([sys.executable, "-c", code, str(world)], check=True)
        lines = (world / "train.jsonl").read_text().splitlines()[:12]
        (world / "few.jsonl").write_text("\n".join(lines) + "\n")
    import yaml

    folder = work / "base"
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base_config(world)))
    code, output, _ = call(["fit", "--config", "base.yaml", "--print_config"], folder)
    assert code == 0, output
    whole = yaml.safe_load(output[output.index("seed_everything") :])
    rows = [json.loads(line) for line in (world / "few.jsonl").read_text().splitlines()]
    return world, whole, rows


def preload() -> None:
    for name in (
        "torch", "peft", "transformers.models.llama.modeling_llama", "rap_lightning.cli.trainer_cli",
        "rap_lightning.commands.inspect",
    ):  # fmt: skip
        import_module(name)
    import torch
    from lightning.pytorch.cli import LightningCLI

    from rap_lightning.cli.trainer_cli import PreferenceCLI

    torch.set_num_threads(1)
    # the options of validate, test and predict are not looked at here, and take three quarters of the time
    fit = LightningCLI.subcommands()["fit"]
    PreferenceCLI.subcommands = staticmethod(lambda: {"fit": fit})
    gc.collect()
    gc.freeze()  # so that forked processes share these pages


def one(kind: str, number: int, work: Path, made: tuple[Path, dict[str, Any], list[dict[str, Any]]]) -> dict[str, Any]:
    """Run one case."""
    world, whole, rows = made
    folder = work / "case" / f"{kind}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if kind == "config":
        arguments = config_case(number, folder, world, whole)
    else:
        arguments = file_case(number, folder, world, rows)
    code, output, seconds = call(arguments, folder)
    verdict = judged(arguments, code, output)
    if verdict.startswith("wrong"):
        (folder / "arguments.txt").write_text(" ".join(arguments))
        kept = work / "wrong" / folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
    shutil.rmtree(folder)
    last = (output.strip().splitlines() or [""])[-1][:200]
    return {"kind": kind, "number": number, "verdict": verdict, "seconds": round(seconds, 2), "last": last}


def folders(work: Path, count: int, deadline: float) -> None:
    """Run mutated model folders, chat templates and data folders in this process."""
    import tempfile

    import fuzz_cases

    base = fuzz_cases.Base.of_small_models(Path(tempfile.mkdtemp(dir=work)))
    lines = work / "folders.jsonl"
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for number in range(len(found), count):
        if time.perf_counter() > deadline:
            break
        kind = fuzz_cases.KINDS[number % 3]
        one = fuzz_cases.run(kind, number // 3, work / "folder", base)
        found.append({"kind": kind, "verdict": one.verdict, "mutation": one.mutation, "detail": one.detail})
        with lines.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        if one.wrong:
            print(kind, number // 3, one, flush=True)
    verdicts = ("message", "counted", "right", "another", "wrong")
    print(f"\n| | cases | {' | '.join(verdicts)} |\n|---|---|---|---|---|---|---|")
    for kind in fuzz_cases.KINDS:
        mine = [state["verdict"] for state in found if state["kind"] == kind]
        print(f"| {kind} | {len(mine)} | {' | '.join(str(sum(v.startswith(x) for v in mine)) for x in verdicts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--folders", type=int, help="instead: models, templates and data folders, so many in all")
    parser.add_argument("--minutes", type=float, default=3.0, help="stop after this long; call again to go on")
    parser.add_argument("--again", action="store_true", help="only what was wrong before")
    a = parser.parse_args()
    if a.folders is not None and (a.again or any(getattr(a, n) != parser.get_default(n) for n in ("configs", "files"))):
        parser.error("--configs, --files and --again have no effect with --folders")
    a.work = a.work.resolve()
    a.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(a.work / "cache")}
    if a.folders is not None:
        folders(a.work, a.folders, time.perf_counter() + 60 * a.minutes)
        return
    preload()
    made, lines = prepared(a.work), a.work / "cases.jsonl"
    read = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    found = {(state["kind"], state["number"]): state for state in read}
    wanted = [("config", n) for n in range(a.configs)] + [("file", n) for n in range(a.files)]
    wanted.sort(key=lambda case: case[1])
    left = [
        c
        for c in wanted
        if (found[c]["verdict"].startswith("wrong") if c in found else True) and (c in found) >= a.again
    ]
    if not a.again:
        left = [case for case in left if case not in found]
    deadline = time.perf_counter() + 60 * a.minutes
    for kind, number in left:
        if time.perf_counter() > deadline:
            break
        state = one(kind, number, a.work, made)
        found[kind, number] = state
        with lines.open("a") as file:
            file.write(json.dumps(state) + "\n")
        if state["verdict"].startswith("wrong"):
            print(kind, number, state["verdict"], "|", state["last"], flush=True)
    print("\n| | cases | run | message | wrong | slowest, s |\n|---|---|---|---|---|---|")
    for kind in ("config", "file"):
        mine = [state for state in found.values() if state["kind"] == kind]
        counts = [sum(state["verdict"].startswith(v) for state in mine) for v in ("run", "message", "wrong")]
        print(
            f"| mutated {kind}s | {len(mine)} | {' | '.join(map(str, counts))} | "
            f"{max((state['seconds'] for state in mine), default=0)} |"
        )


if __name__ == "__main__":
    main()
