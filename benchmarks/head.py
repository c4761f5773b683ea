"""The head alone: seconds and peak memory of forward and backward, by vocabulary; each method in a process of its own.

python benchmarks/head.py            # the whole table
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import Clock, forget_peak, peak_gb

HERE = Path(__file__).resolve().parent
METHODS = ("ours", "full logits", "torch linear_cross_entropy, chunked")


def one(method: str, vocabulary: int, tokens: int, hidden_size: int, repeats: int) -> dict[str, float]:
    """The fastest of some repeats, and the memory beside what inputs, weight and their gradients take."""
    import torch
    from torch.nn import functional as F

    from rap_lightning.models.logps import Head

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden_size) * 0.05)
    target, up = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)

    def logps() -> torch.Tensor:
        if method == "ours":
            return Head(weight, None).token_logps(hidden, target)
        if method == "full logits":
            return (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    forget_peak()
    before, clock = peak_gb(), Clock()
    for _ in range(repeats):
        clock.start()
        (logps() * up).sum().backward()
        clock.stop()
    return {"cpu": min(clock.cpu), "wall": min(clock.wall), "gb": round(peak_gb() - before, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[49152, 128256, 256000])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default=str(HERE / "results" / "head.md"))
    a = parser.parse_args()
    if a.method:
        print(json.dumps(one(a.method, a.vocabularies[0], a.tokens, a.hidden_size, a.repeats)))
        return
    lines = [
        f"{a.tokens:,} response tokens, hidden size {a.hidden_size}, float32, forward and backward to weight and "
        f"hidden states; the fastest of {a.repeats}. Memory beside the inputs, the weight and their gradients.", "",
        "| vocabulary | method | CPU s | wall s | GB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for vocabulary in a.vocabularies:
        for method in METHODS:
            command = [sys.executable, __file__, "--method", method, "--vocabularies", str(vocabulary)]
            command += ["--tokens", str(a.tokens), "--hidden-size", str(a.hidden_size), "--repeats", str(a.repeats)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines.append(f"| {vocabulary:,} | {method} | failed: {done.stderr.strip().splitlines()[-1][:80]} | | |")
            else:
                found = json.loads(done.stdout.strip().splitlines()[-1])
                lines.append(
                    f"| {vocabulary:,} | {method} | {found['cpu']:.2f} | {found['wall']:.2f} | {found['gb']:.2f} |"
                )
            print(lines[-1], flush=True)
            Path(a.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
