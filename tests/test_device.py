"""Training on a GPU, as far as a CPU can show it: see ``simulated_gpu`` for what is real and what is not."""

from __future__ import annotations

import ast
import dataclasses
import json
import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import rap_lightning
from conftest import build, make_model, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS, lay_out, lay_out_responses
from rap_lightning.batches.prompts import left_pad
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import PairLogps
from rap_lightning.callbacks import Guard
from rap_lightning.losses import AOT, BCO, DPO, KTO, WPO, MarginDPO
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.strategies import FSDP2
from rap_lightning.training.schedules import ConstantWithWarmup

REFERENCES = {"frozen": Frozen, "stored": Stored, "off": AdaptersOff}
LOSSES = {"DPO": DPO, "AOT": AOT, "KTO": KTO, "WPO": WPO, "MarginDPO": MarginDPO}
CASES = [
    ("tree", "frozen", "DPO"), ("tree", "stored", "AOT"), ("tree", "off", "WPO"), ("packed", "off", "MarginDPO"),
    ("padded", "frozen", "KTO"),
]  # fmt: skip
"""Each layout, each reference, and losses that sort the batch, pair it anew, look at tokens, and need rewards."""
STEPS, LOGGED = 8, 3  # an epoch has six, so that workers live through two


def _fitted(folder: Path, layout: str, reference: str, loss: str, **trainer: Any) -> Any:
    made = Stored(folder=str(folder / "store")) if reference == "stored" else REFERENCES[reference]()
    module, data = build(
        folder.parent / "model", folder.parent / "train.jsonl", lora=reference == "off", reference=made, layout=layout,
        loss=LOSSES[loss](), optimizer=sgd, schedule=ConstantWithWarmup(), batch_size=8,
    )  # fmt: skip
    runner = make_trainer(
        folder, max_steps=STEPS, max_epochs=2, log_every_n_steps=LOGGED, callbacks=[Guard()], gradient_clip_val=1.0,
        val_check_interval=None, limit_val_batches=0, **trainer,
    )  # fmt: skip
    return module, data, runner


def _on_the_device(folder: str) -> None:
    """Fit every case on the simulated device; each step's meetings of host and device go into a file."""
    import simulated_gpu

    multiprocessing.set_start_method("fork", force=True)  # for data workers
    torch.set_num_threads(1)
    kept = simulated_gpu.register()
    for case in CASES:
        path = Path(folder) / "-".join(case)
        found: dict[str, Any] = {}
        try:
            with simulated_gpu.Constructors():
                device = {
                    "strategy": simulated_gpu.OneDevice(), "accelerator": "auto", "enable_progress_bar": True,
                }  # fmt: skip
                module, data, trainer = _fitted(path, *case, **device)
                steps, loop = [], trainer.fit_loop.epoch_loop
                advance = loop.advance

                def counted(*args: Any, steps: Any = steps, advance: Any = advance) -> None:
                    simulated_gpu.meetings.clear()
                    advance(*args)
                    steps.append([dataclasses.asdict(one) for one in simulated_gpu.meetings])

                loop.advance = counted
                trainer.fit(module, data)
                loader = data.train_dataloader()
                found = {
                    "steps": steps, "loss": module.step_logger.last.values["loss"],
                    "device": str(next(module.policy.parameters()).device), "shares": module.policy.shares,
                    "workers": loader.num_workers, "stay": loader.persistent_workers, "pinned": loader.pin_memory,
                }  # fmt: skip
        except BaseException:
            found = {"error": traceback.format_exc()}
        path.with_suffix(".json").write_text(json.dumps(found))
    try:
        with simulated_gpu.Constructors():
            found = _offloaded(Path(folder) / "offload", simulated_gpu.DEVICE)
    except BaseException:
        found = {"error": traceback.format_exc()}
    (Path(folder) / "offload.json").write_text(json.dumps(found))
    del kept
    os._exit(0)


def _offloaded(folder: Path, device: str) -> dict[str, Any]:
    """Place a module as fsdp2 with ``cpu_offload`` does, and let guard and metrics see a batch of the device."""

    class Offloading(FSDP2):
        root_device = torch.device(device)  # type: ignore[assignment]

    module, data = build(
        folder.parent / "model", folder.parent / "train.jsonl", loss=BCO(), optimizer=sgd, schedule=ConstantWithWarmup()
    )
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(module, data)  # for its gradients, which stay on the host
    strategy = Offloading(cpu_offload=True)
    strategy.model = module
    strategy.model_to_device()
    (one,) = module.passes
    batch, losses = one.batch.to(device), one.losses.to(device)
    module.passes, module._norm = [dataclasses.replace(one, batch=batch, losses=losses)], None
    Guard().on_before_optimizer_step(trainer, module, trainer.optimizers[0])
    policy = PairLogps.from_segments(torch.zeros(8, device=device), batch.lengths)
    module.step_logger.add("fit", losses, (losses, losses), policy, batch, {})
    return {
        "weights": sorted({str(p.device) for p in module.parameters()}),
        "buffers": sorted({str(one.device) for one in module.buffers()}),
        "computes": [str(module.device), str(module.gradient_norm().device)],
        "loss": module.step_logger.metrics["fit"].compute()["loss"], "expected": float(losses.mean()),
    }  # fmt: skip


@pytest.fixture(scope="module")
def fits(process_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """Of each case: what a fit on the simulated device did."""
    folder = tmp_path_factory.mktemp("device")
    make_model(folder / "model")
    write_jsonl(folder / "train.jsonl", scored_rows(23))
    process = process_server.Process(target=_on_the_device, args=(str(folder),))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    found = {case: json.loads((folder / f"{'-'.join(case)}.json").read_text()) for case in CASES}
    return found | {"folder": folder, "offload": json.loads((folder / "offload.json").read_text())}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_fit_inside_a_device_context_equals_one_on_the_cpu(case: Any, fits: Any) -> None:
    """Lightning builds the model where every new tensor is on the device: nothing there may rely on the host."""
    found = fits[case]
    assert "error" not in found, found["error"]
    assert found["device"] == "simgpu:0"
    assert found["shares"], "a check that fails for another reason than the model's must not turn sharing off"
    module, data, trainer = _fitted(fits["folder"] / f"cpu-{'-'.join(case)}", *case)
    trainer.fit(module, data)
    assert found["loss"] == pytest.approx(module.step_logger.last.values["loss"], rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_plain_step_waits_for_the_device_once(case: Any, fits: Any) -> None:
    steps = fits[case]["steps"]
    assert len(steps) == STEPS
    for number, meetings in enumerate(steps[1:], 2):  # at the first, policy and reference are compared
        waits = [one["place"] for one in meetings if one["waits"]]
        logs = ["step_logger.py:_log_window"] if number % LOGGED == 0 else []
        assert waits == ["guard.py:on_before_optimizer_step", *logs], (number, waits)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_batches_are_prepared_by_workers_and_copied_from_pinned_memory(case: Any, fits: Any) -> None:
    found = fits[case]
    assert (found["workers"], found["stay"], found["pinned"]) == (2, True, True)
    for meetings in found["steps"]:
        batches = [one for one in meetings if one["place"].startswith("types.py")]
        assert len(batches) >= 10
        assert all(one["pinned"] and not one["waits"] and not one["to_host"] for one in batches)


def test_with_offloaded_weights_everything_else_meets_on_the_device(fits: Any) -> None:
    found = fits["offload"]
    assert "error" not in found, found["error"]
    assert found["weights"] == ["cpu"]
    assert found["buffers"] == ["simgpu:0"]
    assert found["computes"] == ["simgpu:0", "simgpu:0"], "of the module, and of the norm of gradients on the host"
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_made_on_the_host_whatever_the_default_device(layout: str) -> None:
    examples = [Example("", 0, None, (0.0, 0.0), [1, 2, 3], [4, 5], [6])]
    plan = BatchPlan((0,), (1.0,), 1, ((0,),))
    with torch.device("meta"):
        made = [
            lay_out(LAYOUTS[layout], examples, plan, 0), lay_out_responses([([1, 2], [3])], 0),
            left_pad([[1, 2], [3]], 0, [{}, {}]),
        ]  # fmt: skip
    found = [getattr(batch, field.name) for batch in made for field in dataclasses.fields(batch)]
    assert {str(one.device) for one in found if isinstance(one, torch.Tensor)} == {"cpu"}


def test_a_draw_with_a_generator_names_its_device() -> None:
    """The device is that of the context otherwise, and there a generator of the host is refused."""
    draws = {"rand", "randn", "randint", "randperm"}
    source = Path(rap_lightning.__file__).parent
    unnamed = [
        f"{path.name}:{call.lineno}"
        for path in source.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in draws
        if {"generator"} <= (given := {keyword.arg for keyword in call.keywords}) and "device" not in given
    ]
    assert not unnamed
