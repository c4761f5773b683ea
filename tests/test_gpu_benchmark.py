"""benchmarks/gpu.py at toy sizes: each section's cases, what ends a process or takes too long, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu
import gpu_cases
import gpu_inputs
from conftest import ROOT
from gpu import Section
from gpu_cases import Setting, Skipped
from gpu_inputs import ADAPTED, FULL, TINY
from gpu_steps import useful_flops
from rap_lightning.batches.sampler import PairSize
from rap_lightning.models.attention_choice import Machine
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.planning.gpus import GPUS

CPU = torch.device("cpu")


@pytest.fixture
def toy(tmp_path: Path) -> Setting:
    return Setting(CPU, tmp_path, toy=True)


def measured(setting: Setting, section: str, only: tuple[str, ...] = ()) -> Section:
    """Run a section's cases in this process, as a worker does, or some of them."""
    found, lines = Section(), setting.work / f"{section}.jsonl"

    def emit(line: dict[str, Any]) -> None:
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    left_out = [name for name in gpu_cases.SECTIONS[section](setting) if only and name not in only]
    gpu_cases.run(section, setting, emit, left_out)
    assert found.read(lines) is None
    return found


def test_environment_and_attention_are_told(toy: Setting) -> None:
    found = {name: measured(toy, name) for name in ("environment", "attention")}
    facts = found["environment"].cases["environment"]
    assert facts["torch"] == torch.__version__
    assert "error" not in facts
    cases = found["attention"].cases
    assert list(cases) == list(gpu_cases.DEMANDS)
    assert {case["ran"] for case in cases.values()} == {"blockwise", "mask"}
    page = gpu.report(found, toy=True, minutes=8)
    assert f"| torch | {torch.__version__} |" in page
    assert "| bf16 (Llama, Qwen) | blockwise (flash attention run by run) | blockwise |" in page


def test_a_kernel_that_does_not_build_is_shown_with_what_ran_instead(
    toy: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Hopper GPU whose kernels fail: there are none here."""
    from rap_lightning.models import attention, attention_check

    monkeypatch.setattr(Machine, "of", lambda device: Machine.cuda((9, 0)))
    monkeypatch.setattr(attention, "UNCHECKED", ("meta",))
    for cached in (attention._working, attention_check.passes):
        cached.cache_clear()
    attention._warned.clear()
    name = "bf16 (Llama, Qwen)"
    case = measured(toy, "attention", (name,)).cases[name]
    for cached in (attention._working, attention_check.passes):
        cached.cache_clear()
    assert (case["chosen"].split()[0], case["ran"], case["failed"]) == ("varlen", "mask", True)
    (line,) = [line for line in gpu.attention_lines(Section(cases={name: case})) if name in line]
    assert "**mask**: attention path varlen is not used on cpu: NotImplementedError" in line


def test_fits_start_at_zero_and_equal_the_padded_layout(toy: Setting) -> None:
    some = tuple(
        f"{kind}, {layout}"
        for kind, layouts in (
            ("32-true, full, Frozen", ("padded", "tree")), ("bf16-mixed, LoRA, AdaptersOff", ("padded", "packed")),
            ("bf16-mixed, QLoRA, Stored", ("tree",)),
        )
        for layout in layouts
    )  # fmt: skip
    found = measured(toy, "fits", some)
    assert list(found.cases) == [name for name in found.planned if name in some]
    lines = gpu.fits_lines(found)
    for name in some[:4]:
        assert "error" not in found.cases[name], found.cases[name]
        assert "| ok |" in next(line for line in lines if name in line)
        assert found.cases[name]["losses"][1] != pytest.approx(found.cases[name]["losses"][0], abs=1e-4), "it trains"
    assert "bitsandbytes isn't installed" in next(line for line in lines if "QLoRA" in line)


def test_a_fit_that_differs_is_marked() -> None:
    cases = {
        "32-true, full, Frozen, padded": {"losses": [0.69, 0.5], "identity": 0.0, "attention": []},
        "32-true, full, Frozen, tree": {"losses": [0.69, 0.51], "identity": 0.0, "attention": []},
        "32-true, full, Stored, tree": {"losses": [0.69, 0.5], "identity": 0.1, "attention": []},
    }
    verdicts = [line.split("|")[2].strip() for line in gpu.fits_lines(Section(cases=cases)) if "32-true, full" in line]
    assert verdicts == ["ok", "**differs**", "**differs**"]


def test_steps_are_measured_beside_the_plan(toy: Setting) -> None:
    toy = Setting(CPU, toy.work, toy=True, gpu=GPUS["h200"])
    names = list(gpu_cases.loads(toy))[:2]
    found = measured(toy, "shapes", tuple(names))
    for name in names:
        case, load = found.cases[name], gpu_cases.loads(toy)[name]
        assert "error" not in case, case
        assert case["pair"] == [load.length // 2] * 3, "pairs are as long as asked"
        assert case["synchronisations"] == 0
        assert case["recompiles"] == 0
        assert case["plan"].get("gb", 0) > 0, case["plan"]
        assert case["mfu"] == pytest.approx(case["teraflops"] / 989)
        assert case["pairs_per_second"] == pytest.approx(load.pairs / case["seconds"])
    page = gpu.report({"shapes": found}, toy=True, minutes=8)
    assert "| 8B with LoRA, 2 pairs of 64 tokens | tiny |" in page
    assert "Useful operations of a pair" in page


SAID = """
tests/test_gpu.py::test_one[cuda] PASSED                     [ 33%]
tests/test_gpu.py::test_two[plain-bf16-cuda] FAILED          [ 66%]
tests/test_gpu.py::test_three[cuda] SKIPPED (no flash-attn)  [100%]
FAILED tests/test_gpu.py::test_two[plain-bf16-cuda] - AssertionError: it fails its self-check here
"""


@pytest.mark.parametrize("in_time", [True, False])
def test_outcomes_of_tests_are_told_also_where_time_is_over(
    in_time: bool, toy: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernels may compile for longer than there is time."""

    def said(command: list[str], *, timeout: float, **_: Any) -> Any:
        assert 1 <= timeout <= 57
        if in_time:
            return SimpleNamespace(stdout=SAID)
        raise subprocess.TimeoutExpired(command, timeout, SAID.rpartition("tests/test_gpu.py::test_three")[0].encode())

    monkeypatch.setattr(gpu_cases.subprocess, "run", said)
    found = measured(Setting(CPU, toy.work, toy=True, end=time.time() + 60), "tests")
    text = "\n".join(gpu.tests_lines(found))
    if in_time:
        assert "1 of 3 tests passed." in text
        assert "- `test_two[plain-bf16-cuda]`: failed: AssertionError: it fails its self-check here" in text
    else:
        assert "1 of 2 tests passed; there was no time for the others." in text
        assert "- `test_two[plain-bf16-cuda]`: failed" in text


@pytest.mark.slow
def test_both_sides_take_the_same_steps(toy: Setting) -> None:
    found = measured(toy, "trl")
    losses = [case["losses"] for case in found.cases.values()]
    assert len(losses) == 4
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=0.05)
    assert "TRL live takes" in "\n".join(gpu.trl_lines(found))


def test_ratios_are_of_the_same_batches() -> None:
    side = {"model": "m", "pairs": 4, "length": 64, "pairs_per_second": 1.0, "losses": [0.69], "tokens_laid": 9}
    cases = {
        f"{name}, round {number}": side | {"seconds": seconds, "peak_gb": peak}
        for number in (1, 2)
        for name, seconds, peak in (
            ("rap-lightning, stored", [1.0, 2.0], 1.0), ("TRL, precomputed", [3.0, 8.0], 3.0),
            ("TRL, live", [5.0, 8.0], 4.0),
        )
    }  # fmt: skip
    text = "\n".join(gpu.trl_lines(Section(cases=cases)))
    assert "TRL precomputed takes 3.50 times (3.00-4.00) as long a step as rap-lightning stored, and 3.00 times" in text
    assert "TRL live takes 4.50 times (4.00-5.00) as long a step as rap-lightning stored" in text


@pytest.mark.parametrize("lora", [False, True])
def test_useful_operations_are_those_that_torch_counts(lora: bool, tmp_path: Path) -> None:
    """Of one sequence: there is no tree, and the masked half of the scores is all that torch counts besides."""
    from torch.utils.flop_counter import FlopCounterMode

    folder = gpu_inputs.write_model(tmp_path / "tiny", TINY, weights=CPU)
    policy = PolicyConfig(str(folder), lora=Lora(r=4) if lora else None, gradient_checkpointing=False).build(
        torch.float32
    )
    policy.causal_lm.set_attn_implementation("eager")
    tokens = 64
    ids = torch.arange(tokens)[None] % 50
    with FlopCounterMode(display=False) as counted:
        policy.causal_lm(input_ids=ids).logits.sum().backward()
    config = policy.causal_lm.config
    masked = tokens * (tokens - 1) // 2
    scores = 4 * config.num_hidden_layers * config.hidden_size * masked * 3  # forward, and twice that backward
    found = useful_flops(policy, [PairSize(0, tokens, 0)], live_reference=False)
    # an adapter's backward pass needs no gradient of the first layer's input
    assert found + scores == pytest.approx(counted.get_total_flops(), rel=0.06 if lora else 1e-3)
    twice = useful_flops(policy, [PairSize(0, tokens, 0)], live_reference=True)
    assert found < twice < 2 * found


def test_pairs_are_as_long_as_asked_and_the_same_on_both_sides() -> None:
    (one,) = gpu_inputs.rows(1, 128)
    tokens = gpu_inputs.tokenizer().apply_chat_template([*one["prompt"], *one["chosen"]], return_dict=False)
    assert abs(len(tokens) - 128) <= 2
    mixed = gpu_inputs.rows(20, 128, mixed=True)
    assert len({len(pair["chosen"][0]["content"].split()) for pair in mixed}) > 5
    assert mixed == gpu_inputs.rows(20, 128, mixed=True)


def test_the_shapes_have_the_sizes_of_their_names() -> None:
    for shape in (*FULL, *ADAPTED):
        said = float(shape.name.split("B")[0])
        assert shape.parameters() / 1e9 == pytest.approx(said, rel=0.25), shape.name


def test_the_model_is_chosen_by_free_memory(toy: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = Setting(torch.device("cuda"), toy.work, toy=False)
    full, adapted = list(gpu_cases.loads(on_gpu).values())[:2]
    chosen = {}
    for free in (139, 30, 9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 10**9, 141 * 10**9))
        chosen[free] = [outcome_of(partial(gpu_cases.fitting, on_gpu, load)) for load in (full, adapted)]
    assert [one.split()[0] for one in chosen[139]] == ["1.5B", "8B"]
    assert [one.split()[0] for one in chosen[30]] == ["0.5B", "8B"]
    assert chosen[9][0] == "the smallest model needs about 15 GB, and 9.0 GB are free"
    assert chosen[9][1].startswith("1B")


def outcome_of(choose: Any) -> str:
    try:
        return str(choose().name)
    except Skipped as reason:
        return str(reason)


def test_out_of_memory_in_a_case_is_told_and_the_next_case_runs(toy: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def broken() -> Any:
        raise ValueError("of its own")

    cases = {"large": full, "broken": broken, "small": lambda: {"seconds": float("nan")}}
    monkeypatch.setitem(gpu_cases.SECTIONS, "shapes", lambda setting: cases)
    found = measured(toy, "shapes").cases
    assert found["large"]["error"].startswith("out of memory: CUDA out of memory. Tried to allocate")
    assert found["broken"]["error"] == "ValueError: of its own"
    assert found["small"]["seconds"] == "nan"


WORKER = """
import json, os, sys, time
section, lines = sys.argv[1:3]
done = sys.argv[sys.argv.index("--done") + 1:]
def emit(**line): open(lines, "a").write(json.dumps(line) + chr(10))
emit(cases=["one", "two", "three", "four"])
for name in ("one", "two", "three", "four"):
    if name in done: continue
    emit(begins=name)
    if name == "two": print("illegal memory access", flush=True); os._exit(134)
    if name == "four": time.sleep(600)
    emit(case=name, value=len(done))
"""


def test_a_case_that_ends_its_process_loses_no_other_and_time_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [0]
    monkeypatch.setattr(gpu, "monotonic", lambda: time.monotonic() + (900 if written[-1] == 3 else 0))
    began = time.monotonic()
    found = gpu.run_section(
        "fits", 800, [], tmp_path, lambda section: written.append(len(section.cases)),
        worker=(sys.executable, "-S", "-c", WORKER),
    )  # fmt: skip
    assert time.monotonic() - began < 550, "it waits for no case"
    assert found.cases["one"] == {"value": 0}
    assert found.cases["two"]["error"] == "the process ended (134): illegal memory access"
    assert found.cases["three"] == {"value": 2}
    assert found.cut == ["four"]
    assert found.note == "stopped after 800 s"
    assert written[-1] == 3
    page = gpu.report({"environment": found}, toy=False, minutes=8)
    assert "This section was stopped after 800 s. Not measured: four." in page


def test_a_worker_that_cannot_start_is_told(tmp_path: Path) -> None:
    found = gpu.run_section(
        "fits", 20.0, [], tmp_path, lambda section: None, worker=(sys.executable, "-S", "-c", "import nothing_at_all")
    )
    assert found.note == (
        "the process ended before its first case (1): ModuleNotFoundError: No module named 'nothing_at_all'"
    )


def test_without_a_gpu_one_sentence_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path / "gpu.md")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu.py: torch sees no GPU.")
    assert "--toy" in said
    assert not list(tmp_path.iterdir())


def test_peaks_are_of_whole_devices_that_are_in_the_table() -> None:
    assert gpu.published("NVIDIA H200") == "h200"
    assert gpu.published("NVIDIA A100 80GB PCIe") == "a100-80gb"
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "NVIDIA L40", "", "CPU (x86_64), 1 threads"):
        assert gpu.published(unknown) is None
    assert set(gpu.NAMES.values()) == set(GPUS)
    assert gpu.figures_of("NVIDIA H200", None) == "141,989"
    assert gpu.figures_of("NVIDIA A10G", None) is None


def test_mixed_devices_and_slices_are_named(toy: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L4"]
    on_gpu = Setting(torch.device("cuda"), toy.work, toy=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * 10**9, 5 * 10**9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(gpu_cases.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="570.86\n"))
    found = gpu_cases.describe(on_gpu)
    assert found["devices"] == f"2, not all alike: {', '.join(names)}; only the first is measured"
    assert "no MFU" in found["MIG"]
    assert (found["driver"], found["memory"]) == ("570.86", "4.0 GB free of 5.0 GB")


def test_nothing_is_claimed_to_be_measured_yet_or_the_page_has_its_figures() -> None:
    page = ROOT / "benchmarks" / "results" / "gpu.md"
    figures = page.with_suffix(".json")
    assert figures.exists() == ("Nothing has been measured on a GPU yet" not in page.read_text(encoding="utf-8"))
    if figures.exists():
        assert not json.loads(figures.read_text(encoding="utf-8"))["toy"]


@pytest.mark.slow
def test_the_whole_command_at_toy_sizes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--toy", "--minutes", "9", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert list(document["sections"]) == list(gpu.SHARES)
    errors = {
        name: case
        for section in document["sections"].values()
        for name, case in section["cases"].items()
        if "error" in case
    }
    assert errors == {}
    assert "figure here says anything about speed" in out.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.partial"))
