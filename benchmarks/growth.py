"""How cost grows with sequence length, pairs in a batch, and the prompt's share; a table and a picture.

python benchmarks/growth.py --model MODEL --layers 6

Random tokens through a model of this shape with random weights and fewer layers; one forward and backward pass, no
optimizer. Each point is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import Clock, forget_peak, peak_gb

HERE = Path(__file__).resolve().parent
LAYOUTS = ("tree", "packed", "padded")


def one(a: argparse.Namespace) -> dict[str, float]:
    """CPU seconds, peak GB and tokens of one batch. Rejected is 0.6 times as long as chosen."""
    import numpy as np
    import torch
    from torch.nn import functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    from rap_lightning.batches.dataset import Example
    from rap_lightning.batches.layouts import LAYOUTS, lay_out
    from rap_lightning.batches.sampler import BatchPlan
    from rap_lightning.models.policy import Policy

    config = AutoConfig.from_pretrained(a.model)
    config.num_hidden_layers = a.layers
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    rng = np.random.default_rng(0)
    prompt = int(a.length * a.share)
    response = a.length - prompt

    def ids(count: int) -> list[int]:
        return rng.integers(3, config.vocab_size, count).tolist()

    examples = [
        Example("", 0, None, (0.0, 0.0), ids(prompt), ids(response), ids(int(0.6 * response))) for _ in range(a.pairs)
    ]
    plan = BatchPlan(tuple(range(a.pairs)), (1.0,) * a.pairs, a.pairs, (tuple(range(a.pairs)),))
    batch = lay_out(LAYOUTS[a.layout], examples, plan, 0)
    forget_peak()
    clock = Clock()
    for _ in range(a.repeats):
        clock.start()
        logps = policy.logps(batch)
        F.softplus(-0.1 * (logps[0::2] - logps[1::2])).mean().backward()
        clock.stop()
    return {"cpu": min(clock.cpu), "gb": peak_gb(), "tokens": batch.input_ids.numel()}


def points() -> list[tuple[str, str, dict[str, Any]]]:
    """(axis, label, options)."""
    return [
        *(("sequence length", str(n), {"length": n}) for n in (512, 1024, 2048, 4096, 8192)),
        *(("pairs", str(n), {"pairs": n, "length": 512}) for n in (1, 2, 4, 8)),
        *(("prompt share", f"{n}%", {"share": n / 100}) for n in (10, 30, 50, 70, 90)),
    ]


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """One column per axis: seconds above, memory below."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(point["axis"] for point in found))
    figure, grid = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for column, axis in enumerate(axes):
        for row, (key, label) in enumerate([("cpu", "CPU seconds"), ("gb", "peak memory, GB")]):
            for layout in LAYOUTS:
                mine = [p for p in found if p["axis"] == axis and p["layout"] == layout]
                grid[row][column].plot([p["label"] for p in mine], [p[key] for p in mine], "o-", label=layout)
            grid[row][column].set(xlabel=axis, ylabel=label)
            grid[row][column].set_ylim(bottom=0)
            grid[row][column].grid(alpha=0.3)
    grid[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(found: list[dict[str, Any]], a: argparse.Namespace) -> None:
    """The table and the picture of what has been measured so far."""
    lines = [
        f"The shape of {Path(a.model).name} with {a.layers} layers, float32, one forward and backward pass, "
        f"the fastest of {a.repeats}. Where an axis is not varied: one pair, 1,024 tokens of prompt and chosen "
        "response (512 along the pairs), 30% of them prompt; rejected is 0.6 times as long as chosen.", "",
        "| axis | | " + " | ".join(f"{x}: tokens, CPU s, GB" for x in LAYOUTS) + " |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for axis, label in dict.fromkeys((p["axis"], p["label"]) for p in found):
        mine = {p["layout"]: p for p in found if (p["axis"], p["label"]) == (axis, label)}
        cells = [f"{p['tokens']:,}, {p['cpu']:.1f}, {p['gb']:.1f}" for x in LAYOUTS if (p := mine.get(x))]
        lines.append(f"| {axis} | {label} | " + " | ".join(cells) + " |")
    Path(f"{a.out}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(found, Path(f"{a.out}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", default=str(HERE / "results" / "growth"), help="written as .md and .png")
    for name, default in (("length", 1024), ("pairs", 1), ("share", 0.3)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=argparse.SUPPRESS)
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.layout:
        print(json.dumps(one(a)))
        return
    found: list[dict[str, Any]] = []
    for axis, label, options in points():
        if options.get("length", 0) > a.longest:
            continue
        for layout in LAYOUTS:
            chosen = {"layout": layout, "model": a.model, "layers": a.layers, "repeats": a.repeats, **options}
            command = [sys.executable, __file__, *(str(x) for k, v in chosen.items() for x in (f"--{k}", v))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            found.append({"axis": axis, "label": label, "layout": layout, **measured})
            print(found[-1], flush=True)
            write(found, a)


if __name__ == "__main__":
    main()
