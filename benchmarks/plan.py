"""``rap-lightning plan`` against what runs take: real runs of ``fit`` on a CPU, every pair as long as the plan says.

    python benchmarks/plan.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Each case is run with the options that plan was given, and its second optimizer step is looked at (``meter.py``). What
torch has allocated is what plan says without its line "process": these two are compared. The process's resident memory
has interpreter, libraries and the heap's gaps in it, and is what plan's total is of.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMON = {
    "--trainer.accelerator": "cpu", "--trainer.max_steps": "2", "--trainer.max_epochs": "-1",
    "--trainer.limit_val_batches": "0", "--trainer.num_sanity_val_steps": "0", "--export.enabled": "false",
    "--checkpoint.save_top_k": "0", "--checkpoint.save_last": "false", "--data.goal": "null",
}  # fmt: skip
FULL: dict[str, str] = {}
LORA = {"--model.policy.lora.r": "16"}
TREE, PADDED = {"--data.layout": "tree"}, {"--data.layout": "padded"}
KEEP, AGAIN = ({"--model.policy.gradient_checkpointing": value} for value in ("false", "true"))
GLOO = {"--trainer.devices": "2", "--trainer.strategy.process_group_backend": "gloo"}
FSDP2 = {"--trainer.strategy": "rap_lightning.strategies.FSDP2", **GLOO}
DDP = {"--trainer.strategy": "DDPStrategy", "--trainer.strategy.gradient_as_bucket_view": "true", **GLOO}
MIXED = {"--trainer.precision": "bf16-mixed"}


def reference(name: str) -> dict[str, str]:
    return {"--model.reference": name}


def size(pairs: int, length: int, budget: int | None = None) -> dict[str, str]:
    found = {"--data.batch_size": str(pairs), "--data.max_length": str(length)}
    return found if budget is None else found | {"--data.token_budget": str(budget)}


CASES: dict[str, dict[str, str]] = {
    "full, Frozen, tree": FULL | reference("Frozen") | TREE | KEEP | size(1, 512),
    "full, Stored, padded": FULL | reference("Stored") | PADDED | KEEP | size(1, 512),
    "full, Stored, tree, checkpointing": FULL | reference("Stored") | TREE | AGAIN | size(2, 1024),
    "full, Frozen, padded, checkpointing": FULL | reference("Frozen") | PADDED | AGAIN | size(2, 512),
    "full, Stored, tree, passes of a pair": FULL | reference("Stored") | TREE | KEEP | size(2, 512, 800),
    "LoRA, AdaptersOff, tree": LORA | reference("AdaptersOff") | TREE | KEEP | size(2, 512),
    "LoRA, AdaptersOff, padded, checkpointing": LORA | reference("AdaptersOff") | PADDED | AGAIN | size(2, 512),
    "full, Stored, tree, bf16-mixed": FULL | reference("Stored") | TREE | KEEP | MIXED | size(1, 512),
    "full, Frozen, tree, checkpointing, FSDP2 of 2": FULL | reference("Frozen") | TREE | AGAIN | FSDP2 | size(1, 512),
    "full, Stored, padded, FSDP2 of 2": FULL | reference("Stored") | PADDED | KEEP | FSDP2 | size(1, 384),
    "LoRA, AdaptersOff, tree, FSDP2 of 2": LORA | reference("AdaptersOff") | TREE | KEEP | FSDP2 | size(1, 512),
    "full, Stored, tree, checkpointing, DDP of 2": FULL | reference("Stored") | TREE | AGAIN | DDP | size(1, 512),
}


def write_pairs(path: Path, count: int, length: int) -> None:
    """Pairs whose prompt and responses are all cut: half of ``length`` each."""
    draw = random.Random(0)
    text = lambda: " ".join(draw.choice(("cat", "tree", "blue", "run", "seven", "soft")) for _ in range(length))  # noqa: E731
    lines = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def command(name: str, options: dict[str, str]) -> list[str]:
    return [
        str(Path(sys.executable).parent / "rap-lightning"),
        name,
        *(part for option in options.items() for part in option),
    ]


def planned(options: dict[str, str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run([*command("plan", options), "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(options: dict[str, str], work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Of the rank that took most."""
    meter = [{"class_path": "meter.Meter", "init_args": {"output": str(work / "found")}}]
    run = command("fit", options | {"--trainer.callbacks": json.dumps(meter)})
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(path.read_text()) for path in work.glob("found.*.json")]
    assert len(ranks) == int(options.get("--trainer.devices", "1")), f"{len(ranks)} ranks were measured"
    return max(ranks, key=lambda rank: rank["traced"])


def compare(model: str, case: dict[str, str], work: Path) -> dict[str, Any]:
    """The plan of a case, and what its run took; bytes."""
    environment = os.environ | {
        "PYTHONPATH": str(HERE), "XDG_CACHE_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1",
    }  # fmt: skip
    source = work / "train.jsonl"
    ranks = int(case.get("--trainer.devices", "1"))
    write_pairs(source, 2 * ranks * int(case["--data.batch_size"]), 2 * int(case["--data.max_length"]))
    options = COMMON | {
        "--model.policy.path": model, "--data.source": str(source), "--trainer.default_root_dir": str(work / "run"),
        **case,
    }  # fmt: skip
    plan = planned(options, environment)
    found = measured(options, work, environment)
    held = plan["bytes_per_rank"]
    return {
        "parts": held, "planned": held["total"] - held["process"], "traced": found["traced"], "total": held["total"],
        "resident": found["resident"], "process": found["process"], "tokens": found["tokens"],
        "kept": [held["weights"] + held["reference"], found["kept"]], "planned_tokens": plan["pass_tokens"],
    }  # fmt: skip


def row(name: str, found: dict[str, Any]) -> str:
    off = lambda said, was: f"{(said - was) / was:+.1%}"  # noqa: E731
    gb = [f"{found[key] / 1e9:.2f}" for key in ("planned", "traced", "total", "resident")]
    return (
        f"| {name} | {found['tokens']:,} | {gb[0]} | {gb[1]} | {off(found['planned'], found['traced'])} "
        f"| {gb[2]} | {gb[3]} | {off(found['total'], found['resident'])} |"
    )


HEAD = """| run | tokens in a pass | planned, GB | allocated by torch | off | planned with process | resident | off |
|---|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> None:
    """Print a table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs="*", help="cases whose name has one of these in it")
    parser.add_argument("--json", help="append every figure, a line each case")
    a = parser.parse_args()
    print(HEAD, flush=True)
    for name, case in CASES.items():
        if a.only and not any(part in name for part in a.only):
            continue
        with tempfile.TemporaryDirectory() as work:
            found = compare(a.model, case, Path(work))
        print(row(name, found), flush=True)
        if a.json:
            with open(a.json, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"case": name, **found}) + "\n")


if __name__ == "__main__":
    main()
