"""The tables and the picture of docs/scaling.md, from the same model as ``rap-lightning plan``.

    python benchmarks/scaling.py > tables.md      # writes docs/scaling.svg

Llama 3.1's shapes at 8B and 70B (their published configs), pairs of 1,024 tokens of which half is prompt, layout tree,
bf16-mixed, gradient checkpointing. No weights are needed, and no GPU: nothing here is measured.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from rap_lightning.models.policy import Lora, PolicyConfig
from rap_lightning.planning.estimate import Spread, duration, memory
from rap_lightning.planning.gpus import GPUS
from rap_lightning.planning.trace import Step, batch_of, trace

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
VOCABULARY, PAIRS, LENGTH = 128_256, 4, 1024
GPU, ROOM, MFU, NETWORK = GPUS["h100-80gb"], 75.2, 0.4, 50.0


def traced(size: str, lora: bool, folder: Path) -> Step:
    """Of one forward pass, weights counted in float32, which they are kept in."""
    config = SHAPES[size] | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    path = folder / size
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    policy = PolicyConfig(str(path), gradient_checkpointing=True, lora=Lora() if lora else None)
    batch = batch_of("tree", PAIRS, LENGTH // 2, LENGTH // 2)
    step = trace(policy, torch.bfloat16, batch, partial(torch.optim.AdamW, lr=1e-6), autocast=torch.bfloat16)
    return Step(
        **{
            **vars(step),
            **{n: 2 * vars(step)[n] for n in ("weights", "gradients", "optimizer", "largest_unit", "root")},
        }
    )


def spreads(ranks: int) -> dict[str, Spread]:
    """Strategies over so many devices, eight to a node."""
    per_node = min(ranks, 8)
    found = {"ddp": Spread("ddp" if ranks > 1 else "single", ranks, per_node, 1, gather=1.0)}
    found["fsdp2"] = Spread("fsdp2", ranks, per_node, ranks, gather=0.5)
    if ranks > 8:
        found["hsdp"] = Spread("fsdp2", ranks, per_node, 8, gather=0.5)
    return found


def main() -> None:
    """Print the tables and write the picture."""
    lines: dict[str, list[tuple[int, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SHAPES:
            for lora in (False, True):
                step = traced(size, lora, Path(folder))
                reference = "AdaptersOff" if lora else "Frozen"
                kind = f"{size} {'LoRA' if lora else 'full'}"
                print(f"\n### {kind}, reference {reference}: {step.parameters / 1e9:.1f}B parameters\n")
                head = "| GPUs | strategy | weights | gradients | optimizer | reference | gathered | activations |"
                print(head + " total GB | fits 80 GB | sent per step, s | computing, s | tokens/s |")
                print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
                for ranks in (1, 8, 16, 64, 256):
                    for name, spread in spreads(ranks).items():
                        held = memory(step, spread, reference, VOCABULARY, "cuda")  # type: ignore[arg-type]
                        time = duration(step, spread, reference, 1, GPU, MFU, NETWORK)  # type: ignore[arg-type]
                        total = held.total / 1e9
                        lines.setdefault(f"{kind} {name}", []).append((ranks, total))
                        parts = (
                            held.weights,
                            held.gradients,
                            held.optimizer,
                            held.reference,
                            held.gathered,
                            held.activations,
                        )
                        cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
                        fits = "yes" if total <= ROOM else "no"
                        print(f"| {ranks} | {name} | {cells} | {total:.1f} | {fits} | {time.communication:.2f} | "
                              f"{time.compute:.2f} | {step.tokens * ranks / time.step:,.0f} |")  # fmt: skip
    Path(__file__).parent.parent.joinpath("docs", "scaling.svg").write_text(picture(lines))


def picture(lines: dict[str, list[tuple[int, float]]]) -> str:
    """Memory of a rank over the number of GPUs, both logarithmic."""
    from math import log2, log10

    width, height, left, top, right, bottom = 720, 430, 60, 30, 170, 50
    x = lambda n: left + (width - left - right) * log2(n) / 8  # noqa: E731
    y = lambda gb: top + (height - top - bottom) * (1 - (log10(gb) - 0.7) / 2.7)  # noqa: E731
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',  # noqa: E501
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18">GB on each GPU, by plan (bf16-mixed, 4 pairs of 1,024 tokens)</text>',
    ]
    for gb in (5, 10, 20, 40, 80, 160, 320, 640, 1280):
        stroke = "#c00" if gb == 80 else "#ddd"
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(gb):.1f}" y2="{y(gb):.1f}" stroke="{stroke}"/>')
        out.append(f'<text x="{left - 6}" y="{y(gb) + 4:.1f}" text-anchor="end">{gb}</text>')
    for n in (1, 8, 16, 64, 256):
        out.append(f'<text x="{x(n):.1f}" y="{height - 28}" text-anchor="middle">{n}</text>')
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">GPUs (8 to a node)</text>'
    )
    colours = {"8B full": "#1f77b4", "8B LoRA": "#6baed6", "70B full": "#d95f02", "70B LoRA": "#fdae61"}
    dashes = {"ddp": "2 3", "fsdp2": "", "hsdp": "7 3"}
    for name, points in lines.items():
        kind, _, strategy = name.rpartition(" ")
        path = " ".join(f"{x(n):.1f},{y(min(gb, 2400)):.1f}" for n, gb in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colours[kind]}" stroke-width="2" '
                   f'stroke-dasharray="{dashes[strategy]}"/>')  # fmt: skip
        n, gb = points[-1]
        out.append(f'<text x="{x(n) + 6:.1f}" y="{y(min(gb, 2400)) + 4:.1f}" fill="{colours[kind]}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    main()
