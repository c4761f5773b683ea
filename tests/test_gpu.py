"""On a GPU what its own tests show on a CPU: each test here runs on the CPU always, and on a GPU where there is one.

``pytest -m gpu`` runs those of the GPU alone, as benchmarks/gpu.py does. On the CPU the varlen kernel is replaced by a
reference implementation, and FlexAttention runs unfused, as in test_attention_paths.
"""

from __future__ import annotations

import dataclasses
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from conftest import build, make_trainer, sgd
from gpu_steps import StepMeter, synchronisations
from rap_lightning.batches.layouts import build_prefix_tree
from rap_lightning.batches.types import copies_at_once
from rap_lightning.callbacks import Guard
from rap_lightning.models import masked_attention
from rap_lightning.models.attention import PATHS, path_of
from rap_lightning.models.attention_check import with_gradients
from rap_lightning.models.attention_choice import Demand, Machine, choose
from rap_lightning.models.logps import Head, multiplies_into_float32
from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.training.schedules import ConstantWithWarmup
from test_attention_paths import hopper_on_cpu, varlen_on_cpu

__all__ = ["hopper_on_cpu", "varlen_on_cpu"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def as_on_a_gpu(device: torch.device, request: pytest.FixtureRequest) -> None:
    if device.type == "cpu":
        request.getfixturevalue("hopper_on_cpu")


def tree_call(device: torch.device, dtype: torch.dtype, **options: Any) -> tuple[AttentionCall, torch.Tensor]:
    """A call on three sequences, two of which share a prompt, longer than a kernel's blocks."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 90, 150)
    made = [np.concatenate([prompt, draw.integers(0, 90, n)]) for n in (70, 133)] + [draw.integers(0, 90, 40)]
    forest = build_prefix_tree(made, shared=True).forest
    assert forest is not None
    tokens, generator = len(forest.end), torch.Generator().manual_seed(0)
    q, up = (torch.randn(1, 4, tokens, 32, generator=generator).to(device, dtype) for _ in range(2))
    k, v = (torch.randn(1, 2, tokens, 32, generator=generator).to(device, dtype) for _ in range(2))
    sinks = torch.linspace(-1, 2, 4, device=device).to(dtype) if options.pop("sinks", False) else None
    return AttentionCall(q, k, v, forest.to(device), 32**-0.5, sinks=sinks, **options), up


OPTIONS = {
    "plain": {}, "window": {"window": 50}, "softcap": {"softcap": 5.0}, "sinks": {"sinks": True},
    "softcap-window": {"softcap": 5.0, "window": 50},
}  # fmt: skip


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_chosen_path_works_and_is_as_close_to_the_truth_as_a_mask(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    call, up = tree_call(device, dtype, **OPTIONS[name])
    demand = Demand(dtype, 32, 32, call.softcap, call.window, call.sinks is not None)
    chosen = choose(demand, Machine.of(device))
    ran = path_of(call)
    assert ran == chosen, "it fails its self-check here: the warnings say why"
    assert ran.path != "mask"
    wide = {key: getattr(call, key).double() for key in ("query", "key", "value")}
    wide["sinks"] = None if call.sinks is None else call.sinks.double()
    truth = with_gradients(masked_attention.attend, dataclasses.replace(call, **wide), up.double())
    masked = with_gradients(masked_attention.attend, call, up)
    for exact, found, other in zip(truth, with_gradients(PATHS[ran.path], call, up), masked, strict=True):
        size = float(exact.abs().max())
        assert float((found - exact).abs().max()) <= 3 * float((other - exact).abs().max()) + 2e-3 * size


def test_the_head_sums_in_float32_whatever_the_weights(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(device, torch.bfloat16) for n in (300, 2000))
    target = torch.randint(0, 2000, (300,), generator=generator).to(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = Head(weight, None).token_logps(hidden, target)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
    grads, expected = (torch.autograd.grad(x.sum(), [hidden, weight]) for x in (found, exact))
    if device.type == "cuda":
        assert multiplies_into_float32(device, torch.bfloat16)
    # a bfloat16 logit of this size is rounded by up to 0.06
    assert float((found - exact).abs().max()) <= (1e-3 if device.type == "cuda" else 0.2)
    for a, b in zip(grads, expected, strict=True):
        assert float((a - b).abs().max()) <= 0.05 * float(b.abs().max())


@pytest.mark.skipif(not find_spec("flash_attn"), reason="flash-attn isn't installed")
def test_flash_attention_computes_packed_sequences(device: torch.device, tiny: Path, pairs_folder: Path) -> None:
    if device.type == "cpu":
        pytest.skip("flash-attn has no kernel for CPUs")
    losses = []
    for implementation in (None, "flash_attention_2"):
        policy = PolicyConfig(str(tiny), attn_implementation=implementation)
        module, data = build(tiny, pairs_folder, policy=policy, reference=Frozen(), layout="packed", optimizer=sgd)
        trainer = make_trainer(
            pairs_folder.parent, accelerator="cuda", devices=1, max_steps=2, precision="bf16-mixed", logger=False
        )
        trainer.fit(module, data)
        losses.append(module.step_logger.last.values["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


class Arrivals(pl.Callback):
    """Where batches are when they reach the step."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.devices |= {part.input_ids.device.type for part in batch}


def fitted(device: torch.device, tiny: Path, pairs: Path, folder: Path, *callbacks: Any, steps: int) -> Any:
    module, data = build(
        tiny, pairs, reference=Frozen(), batch_size=2, optimizer=sgd, schedule=ConstantWithWarmup(),
    )  # fmt: skip
    trainer = make_trainer(
        folder, accelerator=device.type, devices=1, max_steps=steps, precision="bf16-mixed", log_every_n_steps=1000,
        logger=False, callbacks=[*callbacks, Guard()], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return module, data


def test_a_plain_step_waits_for_the_device_at_most_twice(
    device: torch.device, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    meter = StepMeter(device, warm_up=2, timed=2, counted=4)
    fitted(device, tiny, pairs_folder, tmp_path, meter, steps=meter.steps)
    assert meter.found["synchronisations"] <= 2, meter.found["waits"]
    assert meter.found["recompiles"] == 0
    assert meter.found["seconds"] > 0
    assert meter.found["peak_gb"] > 0


def test_batches_come_in_page_locked_memory_from_workers(
    device: torch.device, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    arrivals = Arrivals()
    _, data = fitted(device, tiny, pairs_folder, tmp_path, arrivals, steps=2)
    loader = data.train_dataloader()
    assert arrivals.devices == {device.type}
    assert bool(loader.pin_memory) == copies_at_once(device)
    assert (loader.num_workers > 0) == (device.type == "cuda")
    if device.type == "cuda":
        assert all(part.input_ids.is_pinned() for part in next(iter(loader)))


def test_waits_are_counted_by_the_line_that_made_them(device: torch.device) -> None:
    numbers = torch.arange(3, device=device)
    with synchronisations(device) as found:
        if device.type == "cpu":
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        else:
            int(numbers.sum())
            float(numbers[0])
    assert sum(found.values()) == 2 or (device.type == "cuda" and sum(found.values()) > 2)
    assert all(place.startswith("tests/test_gpu.py:") for place in found)
