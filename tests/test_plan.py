"""rap-lightning plan: what it says against what runs take, and what it says to mistakes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_model
from rap_lightning.commands import plan
from rap_lightning.errors import ConfigError
from rap_lightning.models.attention_choice import Machine
from rap_lightning.models.policy import evaluating
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.planning.estimate import Spread, duration, memory
from rap_lightning.planning.gpus import GPUS, find_gpu
from rap_lightning.planning.trace import Step, batch_of, trace
from test_sharded_load import save

REAL = "RAP_LIGHTNING_PLAN_MODEL"
ADAMW = partial(torch.optim.AdamW, lr=1e-4, fused=True)
ALONE = Spread("single", 1, 1, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its activations outweigh what else a step makes."""
    return make_model(
        tmp_path_factory.mktemp("plan") / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        tie_word_embeddings=True,
    )  # fmt: skip


def config(model: Path, *, lora: bool = False, again: bool = False) -> PolicyConfig:
    return PolicyConfig(str(model), gradient_checkpointing=again, lora=Lora(r=8) if lora else None)


def allocated(config: PolicyConfig, layout: str, *, passes: int = 1, reference: bool = True) -> int:
    """What torch allocates for the second step of a real policy, and its weights."""
    from meter import MARK, held, most_allocated

    policy, batch = config.build(torch.float32), batch_of(layout, 2, 100, 100)
    optimizer = ADAMW([p for p in policy.parameters() if p.requires_grad])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        for step in range(2):
            mark = torch.empty(MARK) if step else None
            optimizer.zero_grad()
            for _ in range(passes):
                loss = policy(batch).sum()
                if reference:
                    with torch.no_grad(), evaluating(policy):
                        policy(batch)
                loss.backward()
            optimizer.step()
        del mark
    return held(policy) + most_allocated(profile) - 4 * MARK


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
def test_memory_is_what_a_step_allocates(model: Path, layout: str, lora: bool, again: bool) -> None:
    options = config(model, lora=lora, again=again)
    step = trace(options, torch.float32, batch_of(layout, 2, 100, 100), ADAMW)
    said = memory(step, ALONE, "AdaptersOff" if lora else "Stored", "cpu")
    assert said.total - said.process == pytest.approx(allocated(options, layout), rel=0.1)


def test_from_the_second_pass_on_gradients_are_there_before(model: Path) -> None:
    options = config(model)
    step = trace(options, torch.float32, batch_of("tree", 2, 100, 100), ADAMW, reference=False)
    once, twice = (memory(step, ALONE, "Stored", "cpu", passes=passes).total for passes in (1, 2))
    measured = allocated(options, "tree", passes=2, reference=False)
    assert once < twice
    assert twice - memory(step, ALONE, "Stored", "cpu").process == pytest.approx(measured, rel=0.1)


def test_checkpointing_and_a_part_of_the_layers(model: Path) -> None:
    kept, again = (
        trace(config(model, again=again), torch.float32, batch_of("padded", 4, 100, 100), ADAMW)
        for again in (False, True)
    )
    assert again.peak(0) < 0.6 * kept.peak(0)
    assert again.flops == pytest.approx(kept.flops * 4 / 3, rel=0.1)  # layers are computed a second time


def test_operations_are_those_that_torch_counts(model: Path) -> None:
    options, batch = config(model), batch_of("padded", 2, 60, 60)
    step = trace(options, torch.float32, batch, ADAMW)
    policy = options.build(torch.float32)
    with FlopCounterMode(display=False) as counter:
        policy(batch).sum().backward()
    attention = step.flops - counter.get_total_flops()  # its CPU kernel is not known to torch's counter
    # q k^T and p v, of which causality leaves half, for each of 4 rows and 6 layers; 2.5 times as many backward
    assert attention == 6 * 4 * 3.5 * 4 * 120 * 120 * 128 * 0.5
    assert step.reference_flops == pytest.approx(step.flops / 3, rel=0.02)


def test_optimizers_on_a_gpu_update_all_weights_at_once(model: Path) -> None:
    plain = partial(torch.optim.AdamW, lr=1e-4)
    one, all_ = (
        trace(config(model), torch.float32, batch_of("tree", 1, 8, 8), plain, foreach=foreach)
        for foreach in (False, True)
    )
    assert one.update < 0.5 * all_.update
    assert all_.update >= all_.weights


@pytest.mark.parametrize(
    ("kind", "machine", "path"),
    [
        ("llama", Machine.cuda((9, 0)), "varlen"),
        ("gemma2", Machine.cuda((9, 0)), "flex"),
        ("llama", Machine.cuda((7, 5)), "flex"),
        ("gemma2", Machine.cuda((8, 0), "no C compiler"), "mask"),
        ("llama", Machine("cpu"), "blockwise"),
        ("gemma2", Machine("cpu"), "mask"),
    ],
)
def test_attention_is_traced_as_the_planned_machine_computes_it(
    kind: str, machine: Machine, path: str, tmp_path: Path
) -> None:
    policy = PolicyConfig(str(save(tmp_path, kind)))
    short, long = (
        trace(policy, torch.bfloat16, batch_of("tree", 1, size, size), ADAMW, reference=False, machine=machine)
        for size in (128, 256)
    )
    assert [way.split()[0] for way in short.attention] == [path]
    # scores of 4 heads, kept by each of 2 layers, in bfloat16; all else is linear in the length
    beyond = long.peak(0) - 2 * short.peak(0)
    squared = (768**2 - 2 * 384**2) * 2 * 4 * 2
    assert (beyond > squared) == (path == "mask"), (beyond, squared)


STEP = Step(
    parameters=1000, trainable=1000, weights=4000, gradients=4000, optimizer=8000, largest_unit=400, root=800,
    timeline=((1000, 0), (100, 4000)), update=0, tokens=10, response_tokens=5, flops=60_000, reference_flops=20_000,
    vocabulary=10,
)  # fmt: skip


def test_ddp_holds_gradients_once_or_twice() -> None:
    alone, view, apart = (
        memory(STEP, spread, "Stored", "cuda")
        for spread in (ALONE, Spread("ddp", 4, 4, 1), Spread("ddp", 4, 4, 1, separate_buckets=True))
    )
    assert (alone.gradients, view.gradients, apart.gradients) == (4000, 4000, 8000)
    assert view.activations == 1000  # gradients are there all the time, and activations come on top
    assert alone.activations == 100
    assert apart.total - apart.process - (alone.total - alone.process) == 4000


def test_sharding_divides_what_is_kept_and_gathers_the_rest() -> None:
    whole, part = (memory(STEP, Spread("fsdp2", 8, 8, n), "Frozen", "cuda") for n in (1, 8))
    for name in ("weights", "gradients", "optimizer", "reference"):
        assert getattr(part, name) == getattr(whole, name) / 8
    assert whole.gathered == 0
    assert part.gathered >= STEP.root
    hybrid = memory(STEP, Spread("fsdp2", 16, 8, 8), "Frozen", "cuda")
    assert replace(hybrid, process=part.process) == part  # it has a communicator more
    away = memory(STEP, Spread("fsdp2", 8, 8, 8, offload=True), "Frozen", "cuda")
    assert (away.weights, away.optimizer) == (0, 0)
    assert away.host == part.weights + part.gradients + part.optimizer + part.reference


def test_a_step_takes_its_operations_over_the_peak_and_what_travels() -> None:
    gpu = GPUS["h100-80gb"]
    live, stored = (duration(STEP, ALONE, r, 2, gpu, 0.5, 50) for r in ("Frozen", "Stored"))
    assert stored.compute == pytest.approx(2 * 60_000 / (989e12 * 0.5))
    assert live.compute == pytest.approx(2 * 80_000 / (989e12 * 0.5))
    assert stored.communication == 0
    near, far = (duration(STEP, Spread("ddp", n, 8, 1), "Stored", 1, gpu, 0.5, 50) for n in (8, 16))
    assert near.communication == pytest.approx(2 * 4000 * 7 / 8 / (0.8 * 450e9))
    assert far.communication == pytest.approx(2 * 4000 * 15 / 16 / (0.8 * 50e9))


# -- the command ------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    code = plan.run([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def options(tiny: Path) -> list[str]:
    return ["--model.policy.path", str(tiny), "--data.source", "nowhere.jsonl", "--data.max_length", "200"]


def test_many_nodes_are_planned_without_any_device_or_data(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*options(tiny), "--devices", "8", "--nodes", "4", "--gpu", "h100-80gb", "--trainer.precision", "bf16-mixed"]
    code, found = said(capsys, *args, "--trainer.strategy", "fsdp2")
    assert code == 0
    assert (found["ranks"], found["shard"], found["strategy"]) == (32, 32, "fsdp2")
    assert found["pairs_per_step"] == 4 * 32
    assert found["tokens_per_step"] == 32 * 4 * 300  # a tree: half of 200 is prompt, and there are two responses
    assert found["bytes_per_rank"]["optimizer"] == pytest.approx(8 * found["parameters"] / 32, rel=0.01)
    assert found["seconds_per_step"] > 0
    assert plan.run(args) == 0
    assert "32 ranks, 4 nodes of 8" in capsys.readouterr().out


def test_the_longest_pair_fits_and_a_longer_one_does_not(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, all_ = said(capsys, *options(tiny), "--memory", "5")
    assert all_["longest_pair"] == 512  # what the model takes
    room = f"{(all_['bytes_per_rank']['total'] + 2e6) / 1e9:.5f}"
    code, found = said(capsys, *options(tiny), "--memory", room)
    longest = found["longest_pair"]
    assert code == 0
    assert 200 < longest < 512
    for length, code in ((longest, 0), (int(longest * 1.1), 1)):
        assert said(capsys, *options(tiny), "--memory", room, "--length", str(length))[0] == code


def test_what_does_not_fit_comes_with_what_to_change(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = said(capsys, *options(tiny), "--memory", "0.551")
    assert code == 1
    assert not found["fits"]
    (budget,) = (line for line in found["advice"] if "token_budget" in line)
    assert "--data.token_budget 300 " in budget
    again = said(capsys, *options(tiny), "--memory", "0.551", "--data.token_budget", "300")[1]
    assert again["passes"] == 4
    assert again["bytes_per_rank"]["total"] < found["bytes_per_rank"]["total"]
    for change in ("--model.reference Stored", "gradient_checkpointing true", "--model.policy.lora.r 16"):
        assert any(change in line for line in found["advice"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--gpu", "h100"], "Did you mean h100-80gb or h100-pcie?"),
        (["--gpu", "H20O"], "Did you mean h200?"),
        (["--gpu", "l4", "--memory", "24"], "have no effect with --gpu"),
        (["--teraflops", "100"], "needs --memory"),
        (["--devices", "0"], "--devices must be at least 1, found 0"),
        (["--nodes", "-1"], "--nodes must be at least 1, found -1"),
        (["--length", "1"], "--length must be at least 2"),
        (["--mfu", "1.5"], "--mfu is a share"),
        (["--memory", "0"], "--memory must be above 0"),
        (["--config", "nowhere.yaml"], "--config: no such file: .*nowhere.yaml. Expected the path of a YAML file"),
        ([], "missing: --model.policy.path, --data.source. Give them as options"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_built(args: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        plan.run(args)


def test_a_config_without_a_model_and_a_folder_without_one(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 1}\n")
    with pytest.raises(ConfigError, match=r"missing: --model\.policy\.path"):
        plan.run(["--config", str(tmp_path / "config.yaml")])
    with pytest.raises(ConfigError, match="the folder exists, but"):
        plan.run([*options(tmp_path), "--gpu", "l4"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trainer.accelerator", "gpu"], "say which with --gpu"),
        (["--trainer.accelerator", "cpu", "--gpu", "l4"], "accelerator cpu"),
        (["--trainer.precision", "64-true"], "precisions"),
        (["--data.token_budget", "250"], "below the 300 tokens of one pair of 200"),
        (["--data.token_budget", "250", "--prompt_share", "0.2"], "20% of it prompt"),
        (["--trainer.strategy", "deepspeed_stage_3"], "ZeRO stage 3"),
        (["--trainer.devices", "two"], "expected a number, a list of them, or auto; found two"),
    ],
)
def test_options_that_contradict_each_other(tiny: Path, args: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        plan.run([*options(tiny), *args])


@pytest.mark.parametrize(("devices", "ranks"), [("2", 2), ("0,", 1), ("0,1,3", 3), ("[0, 1]", 2), ("auto", 1)])
def test_devices_are_counted_as_lightning_counts_them(
    devices: str, ranks: int, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, *options(tiny), "--trainer.devices", devices)[1]["ranks"] == ranks


def test_gpus_have_plausible_figures() -> None:
    for name, gpu in GPUS.items():
        assert find_gpu(name.upper()) is gpu
        assert 1 < gpu.teraflops / gpu.memory < 25
        assert gpu.source


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_plan_is_within_15_percent_of_real_runs(tmp_path: Path) -> None:
    if REAL not in os.environ:
        pytest.skip(f"{REAL} names no model: a Hugging Face folder, SmolLM2-135M say (runs take up to 4 GB)")
    from plan import CASES, compare  # benchmarks/plan.py

    for number, (name, case) in enumerate(CASES.items()):
        (tmp_path / str(number)).mkdir()
        found = compare(os.environ[REAL], case, tmp_path / str(number))
        assert found["planned"] == pytest.approx(found["traced"], rel=0.15), name
        assert found["tokens"] == pytest.approx(found["planned_tokens"], rel=0.05), name
