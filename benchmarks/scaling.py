"""The tables and the picture of docs/scaling.md, from the same model as ``rap-lightning plan``.

    python benchmarks/scaling.py > tables.md      # writes docs/scaling.png

Llama 3.1's shapes at 8B and 70B (their published configs), pairs of 1,024 tokens of which half is prompt, layout tree,
bf16-mixed, gradient checkpointing. No weights are needed, and no GPU: nothing here is measured.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.planning.estimate import MFU, USABLE, Memory, ReferenceKind, Spread, Time, duration, memory
from rap_lightning.planning.gpus import GPUS
from rap_lightning.planning.trace import Step, batch_of, trace

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
VOCABULARY, PAIRS, LENGTH = 128_256, 4, 1024
GPU, NETWORK = GPUS["h100-80gb"], 50.0
ROOM = GPU.memory * USABLE
RANKS = (1, 8, 16, 64, 256)


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
    optimizer = partial(torch.optim.AdamW, lr=1e-6, fused=True)
    # an adapter's base is kept in bfloat16 on a GPU
    kept = torch.bfloat16 if lora else torch.float32
    machine = GPU.machine
    return trace(policy, torch.bfloat16, batch, optimizer, kept=kept, autocast=torch.bfloat16, machine=machine)


def spreads(ranks: int, lora: bool) -> dict[str, Spread]:
    """Strategies over so many devices, eight to a node. Gathered weights are bfloat16, as an adapter's base is kept."""
    gather = 1.0 if lora else 0.5
    per_node = min(ranks, 8)
    found = {"ddp": Spread("ddp", ranks, per_node, 1), "fsdp2": Spread("fsdp2", ranks, per_node, ranks, gather=gather)}
    if ranks == 1:
        return {"single": Spread("single", 1, 1, 1)}
    if ranks > 8:
        found["hsdp"] = Spread("fsdp2", ranks, per_node, 8, gather=gather)
    return found


def planned(step: Step, spread: Spread, reference: ReferenceKind) -> tuple[Memory, Time]:
    """What a rank holds, and how long a step takes."""
    return (memory(step, spread, reference, "cuda"), duration(step, spread, reference, 1, GPU, MFU[False], NETWORK))


def main() -> None:
    """Print the tables and write the picture."""
    steps: dict[tuple[str, bool], Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SHAPES:
            for lora in (False, True):
                steps[size, lora] = traced(size, lora, Path(folder))
    tables(steps)
    picture(steps, Path(__file__).parent.parent / "docs" / "scaling.png")


def references(lora: bool) -> tuple[ReferenceKind, ...]:
    return ("AdaptersOff",) if lora else ("Frozen", "Stored")


def tables(steps: dict[tuple[str, bool], Step]) -> None:
    """One for each model and kind of training."""
    for (size, lora), step in steps.items():
        for reference in references(lora):
            kind = "LoRA" if lora else "full"
            print(f"\n### {size} {kind}, reference {reference}: {step.parameters / 1e9:.1f}B parameters, "
                  f"{step.trainable / 1e6:,.0f}M trained\n")  # fmt: skip
            print("| GPUs | strategy | weights | gradients | optimizer | reference | gathered | activations "
                  "| total GB | fits | communication, s | computation, s | pairs/s |")  # fmt: skip
            print("|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|")
            for ranks in RANKS:
                for name, spread in spreads(ranks, lora).items():
                    held, time = planned(step, spread, reference)
                    parts = (
                        held.weights, held.gradients, held.optimizer, held.reference, held.gathered, held.activations
                    )  # fmt: skip
                    cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
                    fits = held.total <= ROOM * 1e9
                    pace = f"{PAIRS * ranks / time.step:,.0f}" if fits else ""
                    print(f"| {ranks} | {name} | {cells} | {held.total / 1e9:.0f} | {'yes' if fits else 'no'} "
                          f"| {time.communication:.2f} | {time.compute:.2f} | {pace} |")  # fmt: skip


def picture(steps: dict[tuple[str, bool], Step], path: Path) -> None:
    """Memory of a rank, and the share of time that computing could take, over the number of GPUs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    colours = {"ddp": "#b2182b", "fsdp2": "#2166ac", "hsdp": "#1b7837"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), sharex=True, layout="constrained")
    columns = [("8B", False, "8B, full"), ("70B", False, "70B, full"), ("70B", True, "70B, LoRA")]
    for column, (size, lora, title) in enumerate(columns):
        step, reference = steps[size, lora], references(lora)[-1]
        top, bottom = axes[:, column]
        for name, colour in colours.items():
            points = [(n, *planned(step, spreads(n, lora)[name], reference)) for n in RANKS if name in spreads(n, lora)]
            top.plot([n for n, *_ in points], [m.total / 1e9 for _, m, _ in points], "o-", color=colour, label=name)
            pace = [(n, PAIRS / t.step) for n, m, t in points if m.total <= ROOM * 1e9]
            bottom.plot(*zip(*pace, strict=True) if pace else ([], []), "o-", color=colour, label=name)
        alone = planned(step, spreads(1, lora)["single"], reference)[0].total / 1e9
        top.plot([1], [alone], "s", color="#555555", label="one GPU")
        top.axhline(ROOM, color="black", lw=1, ls="--")
        top.text(250, ROOM * 1.06, "what an 80 GB GPU has", ha="right", fontsize=8)
        top.set_title(f"{title}, reference {reference}", fontsize=10)
        top.set(xscale="log", yscale="log", ylim=(8, 1600))
        bottom.set(xscale="log", xlabel="GPUs, eight to a node")
        bottom.set_xticks(RANKS, [str(n) for n in RANKS])
        bottom.minorticks_off()
        top.yaxis.set_major_formatter(ScalarFormatter())
        for ax in (top, bottom):
            ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("GB on each GPU")
    axes[1, 0].set_ylabel("pairs/s of each GPU\n(only what fits)")
    for ax in axes[1]:
        ax.set_ylim(0, 1.25 * ax.dataLim.ymax)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Reckoned, not measured: H100s, pairs of 1,024 tokens, 4 on each, bf16-mixed, checkpointing",
                    fontsize=11)  # fmt: skip
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
