"""Real processes on this machine: as many as there are, the run is the same, and so is what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import processes
import rank_worker
from cli_process import fit_on_ranks
from processes import alone, differences, on_two_hosts, start, variants

pytestmark = pytest.mark.timeout(1200)
ONE = {"ranks": 1, "strategy": "auto"}


def assert_same_run(folder: Path, one: str, other: str) -> None:
    """Loss, every metric and the final weights to 1e-5 (as a share, of values larger than 1)."""
    found = differences(folder, one, other)
    assert max(found.values()) <= 1e-5, (other, found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return processes.make(tmp_path_factory.mktemp("ranks"))


def test_two_sharded_processes_equal_one(base: dict[str, Any], process_server: Any, tmp_path: Path) -> None:
    chosen = {n: c for n, c in variants(base).items() if n in ("tree-frozen", "padded-off")}
    for name, case in chosen.items():
        rank_worker.run(alone(case, f"1-{name}"), tmp_path)
    two = [case | {"name": f"2-{name}", "ranks": 2, "strategy": "fsdp2"} for name, case in chosen.items()]
    fit_on_ranks(process_server, two, 2, tmp_path)
    for name in chosen:
        assert_same_run(tmp_path, f"1-{name}", f"2-{name}")
        assert len(set(torch.load(tmp_path / f"2-{name}.pt")["draws"])) == 2, "random numbers of each rank's own"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_strategy_layout_and_reference_equals_one_process(base: dict[str, Any], tmp_path: Path) -> None:
    all_of_them = variants(base)
    more = {name: all_of_them["tree-frozen"] | case for name, case in processes.MORE.items()}
    start([alone(case, f"1-{name}") for name, case in (all_of_them | more).items()], 1, tmp_path)
    two = [
        case | {"name": f"{s}-{name}", "ranks": 2, "strategy": s}
        for s in ("ddp", "fsdp2")
        for name, case in all_of_them.items()
    ]
    for ranks in (2, 3, 4):
        cases = [case | {"name": name} for name, case in more.items() if case["ranks"] == ranks]
        start(cases + (two if ranks == 2 else []), ranks, tmp_path)
    for name in all_of_them:
        for strategy in ("ddp", "fsdp2"):
            assert_same_run(tmp_path, f"1-{name}", f"{strategy}-{name}")
    for name in more:
        assert_same_run(tmp_path, f"1-{name}", name)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_hosts_equal_one_process(base: dict[str, Any], tmp_path: Path) -> None:
    if not processes.can_two_hosts():
        pytest.skip("two network hosts need root, iproute2 and shared/tools/two-nodes.sh")
    chosen = {n: c for n, c in variants(base).items() if n in ("tree-frozen", "padded-off", "tree-stored")}
    hosts = [
        c | {"name": f"{s}-{n}", "ranks": 2, "nodes": 2, "strategy": s}
        for n, c in chosen.items()
        for s in ("ddp", "fsdp2")
    ]
    on_two_hosts(hosts, tmp_path)
    start([alone(c, f"1-{n}") for n, c in chosen.items()], 1, tmp_path)
    for name in chosen:
        for strategy in ("ddp", "fsdp2"):
            assert_same_run(tmp_path, f"1-{name}", f"{strategy}-{name}")


SAVED: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2-whole": {"strategy": "fsdp2", "strategy_options": {"save_distributed_checkpoint": False}},
    "hsdp-2x1": {"strategy": "fsdp2", "strategy_options": {"shard_size": 1}},
    "hsdp-1x2": {"strategy": "fsdp2", "strategy_options": {"shard_size": 2}},
    "offloaded": {"strategy": "fsdp2", "strategy_options": {"cpu_offload": True}},
    "lightning": {"strategy": "model-parallel"},
    "lightning-whole": {"strategy": "model-parallel", "strategy_options": {"save_distributed_checkpoint": False}},
}
EQUAL_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "goal.json",
    "generation_config.json",
    "config.json",
    "adapter_config.json",
)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_a_checkpoint_of_any_strategy_exports_to_the_same_folder(
    kind: str, base: dict[str, Any], tmp_path: Path
) -> None:
    from rap_lightning.commands.export import export
    from rap_lightning.onpolicy.model_source import ModelSource

    case = variants(base)["tree-off" if kind == "lora" else "tree-frozen"] | {"every": 3, "export": True}
    case["model"] = base["untied" if kind == "full" else "model"]
    whole_only = {"fsdp2-whole"} if kind == "lora" else set()  # refused, and tested below
    names = ["single", *(name for name in SAVED if name not in whole_only)]

    def saving(name: str) -> dict[str, Any]:
        return {"name": name, "save": str(tmp_path / f"saved-{name}")}

    start([case | ONE | saving("single")], 1, tmp_path)
    start([case | {"ranks": 2} | SAVED[name] | saving(name) for name in names[1:]], 2, tmp_path)
    for name in names:
        saved = tmp_path / f"saved-{name}" / "step=3.ckpt"
        assert saved.is_dir() == (name not in ("single", "ddp", "fsdp2-whole", "lightning-whole"))
        export(str(saved), str(tmp_path / f"hf-{name}"))
        (by_fit,) = (tmp_path / name).rglob("hf")
        assert_same_folder(tmp_path / f"hf-{name}", by_fit, exactly=True)
        assert_same_folder(tmp_path / f"hf-{name}", tmp_path / "hf-single", exactly=False)
        trained = {n.removeprefix("model."): v for n, v in torch.load(tmp_path / f"{name}.pt")["weights"].items()}
        for key, value in tensors(tmp_path / f"hf-{name}").items():
            assert torch.equal(value, trained[key.replace(".weight", ".default.weight") if kind == "lora" else key])
    sampled = ModelSource(str(tmp_path / "saved-fsdp2" / "step=3.ckpt"))
    assert sampled.record() == ModelSource(str(tmp_path / "saved-single" / "step=3.ckpt")).record() is not None
    loaded = sampled.load(torch.float32, "cpu").state_dict()
    for key, value in torch.load(tmp_path / "fsdp2.pt")["weights"].items():
        assert torch.equal(loaded[key.removeprefix("model.")], value), key


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_folder(one: Path, other: Path, *, exactly: bool) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0 if exactly else 1e-6, msg=f"{one.name}: {name}")
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert sum((one / name).is_file() for name in EQUAL_FILES) >= 5
    for name in EQUAL_FILES:
        if (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_goes_on_on_one_two_and_three_processes(lora: bool, base: dict[str, Any], tmp_path: Path) -> None:
    """Within an epoch and at its end; with accumulation before and after; a last step of 10 pairs instead of 12."""
    kind = variants(base)["tree-off" if lora else "tree-frozen"] | {"strategy": "fsdp2", "pairs_per_step": 12}
    every = {"max_epochs": 2}
    folder = tmp_path / "saved"
    run = kind | {"trainer": every, "ranks": 2}
    start(
        [run | {"name": "plain", "save": str(folder / "plain")},
         run | {"name": "accumulated", "save": str(folder / "accumulated"), "accumulate": 3}],
        2, tmp_path,
    )  # fmt: skip
    for ranks in (1, 2, 3):
        cases = [
            kind | {"trainer": every, "ranks": ranks, "name": f"{of}-{step}-{ranks}-{accumulate}",
                    "accumulate": accumulate, "ckpt_path": str(folder / of / f"step={step}.ckpt")}
            for of, step in (("plain", 2), ("plain", 4), ("accumulated", 2), ("accumulated", 6))
            for accumulate in (1, 2)
        ]  # fmt: skip
        start(cases, ranks, tmp_path)
        for case in cases:
            whole, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("plain", case["name"]))
            assert_seen_once(whole["rows"], resumed["rows"], case["name"])
            for key, value in whole["weights"].items():
                torch.testing.assert_close(resumed["weights"][key], value, rtol=1e-5, atol=1e-5, msg=case["name"])


def assert_seen_once(whole: list[dict[str, float]], resumed: list[dict[str, float]], name: str) -> None:
    """Every step that was still to come is run, and each with the pairs that it has in the uninterrupted run."""
    steps = {row["step"]: row for row in whole if "loss" in row}
    rows = {row["step"]: row for row in resumed if "loss" in row}
    assert list(rows) == [step for step in steps if step >= min(rows)], name
    assert max(rows) == 8
    for step, row in rows.items():
        assert row["loss"] == pytest.approx(steps[step]["loss"], rel=1e-5), (name, step)
