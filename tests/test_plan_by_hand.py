"""rap-lightning plan against arithmetic on paper, and against speeds that others have published."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rap_lightning.models.logps import ACCELERATOR_CHUNK_BYTES, KEPT_BYTES
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import NoReference, Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.planning.estimate import MFU, NCCL_CONNECTION, PROCESS, Spread, duration
from rap_lightning.planning.gpus import GPUS
from rap_lightning.planning.planner import PlannedRun, Planner
from rap_lightning.planning.trace import Step, batch_of, trace

WIDTH = {"8B": 4096, "70B": 8192}
INNER = {"8B": 14336, "70B": 28672}
LAYERS = {"8B": 32, "70B": 80}
VOCABULARY, KEYS = 128_256, 1024
ADAMW = partial(torch.optim.AdamW, lr=1e-6, fused=True)


def save_config(folder: Path, size: str, layers: int, vocabulary: int = VOCABULARY) -> Path:
    """Llama 3.1's published shape, with so many layers; no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary,
        "hidden_size": WIDTH[size], "intermediate_size": INNER[size], "num_hidden_layers": layers,
        "num_attention_heads": WIDTH[size] // 128, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(folder: Path, ranks: int, *, passes: int = 1, reference: Reference | None = None, **policy: Any) -> Planner:
    """Pairs of 1,024 tokens, half prompt, 4 in a pass, on 80 GB GPUs, bf16-mixed."""
    return Planner(
        PlannedRun(
            PolicyConfig(str(folder), gradient_checkpointing=True, **policy), reference or Stored(), ADAMW,
            "bf16-mixed", Spread("fsdp2", ranks, 8, ranks, gather=0.5), "cuda", 75e9, "tree", 4, None, passes, 1024,
            0.5, GPUS["h100-80gb"].machine,
        )
    )  # fmt: skip


def by_hand(size: str, layers: int, ranks: int, passes: int) -> float:
    """Bytes of a rank in full training under FSDP2, reference Stored."""
    d, f, tokens, responses = WIDTH[size], INNER[size], 4 * 3 * 512, 4 * 2 * 512
    layer = 2 * d * d + 2 * d * KEYS + 3 * d * f + 2 * d
    root = 2 * VOCABULARY * d + d
    n = layers * layer + root
    states = (4 + 8) * n / ranks  # weights and two moments of Adam, float32
    gradients = 4 * n / ranks
    # what one layer keeps for its backward pass, bytes of a token: two norms (a float32 input, a bf16 output); q, k, v;
    # attention's output, twice; gate, up, silu(gate) and their product; and the gradients of three of them
    recomputed = 2 * (4 + 2) * d + 2 * (d + 2 * KEYS) + 2 * 2 * d + 2 * 4 * f + 2 * 3 * f
    logits = min(4 * responses * VOCABULARY, KEPT_BYTES + ACCELERATOR_CHUNK_BYTES)
    backward = (
        2 * root + 3 * 2 * layer  # bf16: root, this layer, the next one, and the buffer that it arrives in
        + 2 * root + (2 + 4) * layer  # gradients: of the root, of a layer, and its float32 copy to reduce
        + 2 * layers * tokens * d + recomputed * tokens
    )  # fmt: skip
    # the head's gradient is summed in float32, and nothing else of the backward pass is there yet
    head = 2 * root + 3 * 2 * layer + 2 * layers * tokens * d + logits + (4 + 2) * root / 2
    end = gradients + 2 * root + (2 + 4) * root
    process = PROCESS["cuda"] + 2 * (1 + 3) * NCCL_CONNECTION  # two communicators: a ring and a tree each
    return states + max(max(backward, head) + (gradients if passes > 1 else 0), end) + process


def check_by_hand(folder: Path, size: str, layers: int, ranks: int) -> None:
    once = planned(save_config(folder, size, layers), ranks)
    many = once._memory(once.step, passes=4)  # the trace is the same
    assert once.memory.total == pytest.approx(by_hand(size, layers, ranks, 1), rel=0.1)
    assert many.total == pytest.approx(by_hand(size, layers, ranks, 4), rel=0.1)


@pytest.mark.parametrize(("size", "ranks"), [("8B", 8), ("70B", 64)])
def test_memory_is_that_of_paper_for_models_of_a_few_layers(size: str, ranks: int, tmp_path: Path) -> None:
    check_by_hand(tmp_path, size, 4, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "ranks"), [("8B", 8), ("70B", 64)])
def test_memory_is_that_of_paper(size: str, ranks: int, tmp_path: Path) -> None:
    check_by_hand(tmp_path, size, LAYERS[size], ranks)


def test_casted_weights_are_not_cached_for_the_rest_of_a_pass(tmp_path: Path) -> None:
    """Lightning's bf16-mixed; with float32 weights, each further layer would keep 0.44 GB of them."""
    steps = [
        trace(
            PolicyConfig(str(save_config(tmp_path, "8B", layers, 2000)), gradient_checkpointing=True), torch.float32,
            batch_of("tree", 1, 128, 128), ADAMW, autocast=torch.bfloat16, reference=False,
        )
        for layers in (1, 6)
    ]  # fmt: skip
    assert steps[1].peak(0) - steps[0].peak(0) < 0.5e9


def test_an_adapter_on_a_gpu_has_a_bfloat16_base(tmp_path: Path) -> None:
    folder = save_config(tmp_path, "8B", 2)
    lora, frozen = (planned(folder, 8, reference=reference, lora=Lora(r=16)) for reference in (AdaptersOff(), Frozen()))
    base = lora.step.parameters - lora.step.trainable
    assert lora.memory.weights == pytest.approx((2 * base + 4 * lora.step.trainable) / 8, rel=1e-3)
    assert lora.memory.gradients == pytest.approx(4 * lora.step.trainable / 8, rel=1e-3)
    assert lora.memory.optimizer == pytest.approx(8 * lora.step.trainable / 8, rel=1e-3)
    assert frozen.memory.reference == pytest.approx(frozen.memory.weights, rel=1e-3)
    full = planned(folder, 8, reference=Frozen())
    assert full.memory.reference == pytest.approx(full.memory.weights / 2)  # bfloat16 beside float32


def test_buffers_of_nccl_grow_with_ranks_and_communicators() -> None:
    def process(spread: Spread) -> float:
        from test_plan import STEP, memory

        return memory(STEP, spread, "Stored", "cuda").process

    alone, two, eight, many = (process(Spread("ddp", n, 8, 1)) for n in (1, 2, 8, 64))
    assert alone == PROCESS["cuda"]
    assert alone < two < eight == many
    sharded, hybrid = (process(Spread("fsdp2", 64, 8, shard)) for shard in (64, 8))
    assert many < sharded < hybrid


def test_speed_is_what_torchtitan_published_for_8b_on_eight_h100(tmp_path: Path) -> None:
    """5,762 tokens/s of each GPU, 6,667 compiled: FSDP, two sequences of 8,192, every second matrix product recomputed.

    https://github.com/pytorch/torchtitan/blob/main/docs/performance.md. No reference, and every token has logits.
    """

    def of(layers: int) -> Step:
        policy = PolicyConfig(str(save_config(tmp_path, "8B", layers)), gradient_checkpointing=2)
        batch = batch_of("padded", 1, 1, 8191)
        return trace(policy, torch.bfloat16, batch, ADAMW, kept=torch.float32, autocast=torch.bfloat16, reference=False)

    two, four = of(2), of(4)
    layers = LAYERS["8B"]
    grown = {  # layers are alike
        name: getattr(two, name) + (getattr(four, name) - getattr(two, name)) * (layers - 2) // 2
        for name in ("flops", "weights", "gradients")
    }
    step = replace(two, **grown)
    assert step.weights == pytest.approx(4 * 8.03e9, rel=0.001)
    for compiled, published in ((False, 5762), (True, 6667)):
        time = duration(
            step, Spread("fsdp2", 8, 8, 8, gather=0.5), "none", 1, GPUS["h100-80gb"], MFU[compiled], network=50
        )
        assert step.tokens / time.step == pytest.approx(published, rel=0.1)


def test_70b_on_64_gpus_sends_what_paper_says() -> None:
    """bf16 weights twice, float32 gradients once, to 63 of 64, over 80% of 50 GB/s: 13.9 s a pass."""
    from test_plan import STEP

    n = 70.55e9
    step = replace(STEP, weights=int(4 * n), gradients=int(4 * n))
    time = duration(step, Spread("fsdp2", 64, 8, 64, gather=0.5), "Stored", 4, GPUS["h100-80gb"], 0.33, 50)
    assert time.communication == pytest.approx(4 * (2 * 2 * n + 4 * n) * 63 / 64 / 40e9, rel=1e-3)


@pytest.mark.parametrize("budget", [None, 3000])
def test_the_longest_pair_fits_when_it_is_planned_again(budget: int | None, tmp_path: Path) -> None:
    run = planned(save_config(tmp_path, "8B", 1, vocabulary=2000), 8, reference=NoReference()).run
    run = replace(run, token_budget=budget, room=run.room, length=256)
    room = Planner(run).memory.total * 1.25
    planner = Planner(replace(run, room=room))
    longest = planner.longest_pair
    assert longest > 256
    assert Planner(replace(run, room=room, length=longest)).memory.total <= room
    if budget is None:
        assert Planner(replace(run, room=room, length=int(longest * 1.1))).memory.total > room
    else:
        assert run.pair_tokens(longest) <= budget
