"""What gpu.py measures: a process runs the cases of one section, and writes a line when a case begins and when it ends.

    python benchmarks/gpu_cases.py SECTION LINES.jsonl --device cuda --work FOLDER

So a case that ends its process, or hangs, loses no other case. Read SECTIONS first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch

import compare
from gpu_inputs import ADAPTED, FULL, TINY, RandomWeights, Shape, rows, write_model, write_pairs
from gpu_steps import StepMeter, useful_flops
from rap_lightning.models.attention import path_of
from rap_lightning.models.attention_check import example, with_gradients
from rap_lightning.models.attention_choice import Demand, Machine, choose
from rap_lightning.planning.gpus import GPU
from rap_lightning.training.out_of_memory import is_out_of_memory

HERE = Path(__file__).resolve().parent
Case: TypeAlias = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Where and at what size to measure.

    Attributes:
        device: "cuda" or "cpu".
        work: a folder for models and pairs.
        toy: sizes at which every line runs on a CPU.
        gpu: published figures of the device, or None where they aren't known.
        end: when the section is stopped, by ``time.time()``.
    """

    device: torch.device
    work: Path
    toy: bool
    gpu: GPU | None = None
    end: float = math.inf

    @property
    def left(self) -> float:
        """Seconds that a process which a case starts may take, so that its case can still say what it knows."""
        return min(max(1.0, self.end - time.time() - 3.0), 3600.0)


class Skipped(Exception):
    """A case that can't be measured here; its text says why."""


# -- environment -------------------------------------------------------------------------------------------------------

PACKAGES = (
    "rap-lightning",
    "torch",
    "triton",
    "transformers",
    "peft",
    "lightning",
    "trl",
    "bitsandbytes",
    "flash-attn",
)


def environment(setting: Setting) -> dict[str, Case]:
    """What the figures were measured with."""
    return {"environment": partial(describe, setting)}


def describe(setting: Setting) -> dict[str, Any]:
    """Return device, driver, packages and compiler as texts."""
    from rap_lightning.models.attention_choice import no_compiler

    found: dict[str, Any] = {}
    if setting.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["device"] = names[0]
        found["memory"] = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["driver"] = driver()
        found["CUDA of torch"] = str(torch.version.cuda or f"ROCm {torch.version.hip}")
        if len(names) > 1:
            others = "all alike" if len(set(names)) == 1 else "not all alike: " + ", ".join(names)
            found["devices"] = f"{len(names)}, {others}; only the first is measured"
        if "MIG" in names[0]:
            found["MIG"] = "a slice of a GPU: no published peak, so no MFU"
    else:
        found["device"] = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    found["compiler"] = no_compiler() or "found"
    found["Python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def driver() -> str:
    """Return the driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown (no nvidia-smi)"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


# -- attention ---------------------------------------------------------------------------------------------------------

HALF = torch.bfloat16
DEMANDS = {
    "bf16 (Llama, Qwen)": Demand(HALF, 128, 128),
    "bf16, soft cap and window (Gemma 2)": Demand(HALF, 128, 128, softcap=50.0, window=4096),
    "bf16, window (Mistral v0.1)": Demand(HALF, 128, 128, window=4096),
    "bf16, sinks (gpt-oss)": Demand(HALF, 64, 64, sinks=True),
    "fp32": Demand(torch.float32, 128, 128),
    "bf16, soft cap": Demand(HALF, 128, 128, softcap=50.0),
    "fp16": Demand(torch.float16, 128, 128),
    "bf16, sinks and window (gpt-oss)": Demand(HALF, 64, 64, window=128, sinks=True),
}


def attention(setting: Setting) -> dict[str, Case]:
    """For each kind of layer: the path that is chosen, and whether it works here."""
    return {name: partial(attend, setting, demand) for name, demand in DEMANDS.items()}


def attend(setting: Setting, demand: Demand) -> dict[str, Any]:
    """Compute attention and its gradients on a small tree, after the check that precedes any path's first use."""
    from rap_lightning.models.attention import PATHS

    chosen = choose(demand, Machine.of(setting.device))
    call, up = example(demand, 8, 2, setting.device)
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ran = path_of(call)
    with_gradients(PATHS[ran.path], call, up)
    seconds = time.perf_counter() - begun
    why = [str(one.message) for one in said if "attention" in str(one.message)]
    return {"chosen": str(chosen), "ran": ran.path, "failed": ran.path != chosen.path, "why": why, "seconds": seconds}


# -- tests -------------------------------------------------------------------------------------------------------------


def tests(setting: Setting) -> dict[str, Case]:
    """The tests that a GPU is needed for; at toy sizes the same tests on the CPU."""
    return {"tests/test_gpu.py": partial(run_tests, setting)}


def run_tests(setting: Setting) -> dict[str, Any]:
    """Return the outcome of each test, of those that ran where time was over."""
    if find_spec("pytest") is None:
        raise Skipped("pytest isn't installed: pip install -e '.[test]'")
    chosen = ["-m", "not gpu"] if setting.toy else ["-m", "gpu"]
    command = [sys.executable, "-u", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    stopped = ""
    try:
        done = subprocess.run(
            [*command, "tests/test_gpu.py"], cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=setting.left,
        )  # fmt: skip
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        stopped = "there was no time for the others"
    outcomes = outcomes_in(said)
    if not outcomes and not stopped:
        raise RuntimeError(last_line(said))
    return {"outcomes": outcomes, "stopped": stopped}


def outcomes_in(said: str) -> dict[str, str]:
    """Return "passed", "failed: why", ... by test, of what ``pytest -v`` prints."""
    outcomes = {
        name: how.lower() for name, how in re.findall(r"^\S+?::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", said, re.M)
    }
    for how, name, why in re.findall(r"^(FAILED|ERROR) \S+?::(\S+) - (.+)", said, re.M):
        outcomes[name] = f"{how.lower()}: {why[:300]}"
    return outcomes


# -- fits --------------------------------------------------------------------------------------------------------------

LAYOUTS = ("padded", "tree", "packed")
KINDS = {
    "full": ("Frozen", "Stored"), "LoRA": ("Frozen", "AdaptersOff", "Stored"),
    "QLoRA": ("Frozen", "AdaptersOff", "Stored"),
}  # fmt: skip
PRECISIONS = ("bf16-mixed", "32-true")
FIT_STEPS = 3


def fits(setting: Setting) -> dict[str, Case]:
    """Short runs on a tiny model: each precision, kind of training, reference and layout."""
    return {
        f"{precision}, {kind}, {reference}, {layout}": partial(fit, setting, precision, kind, reference, layout)
        for precision in PRECISIONS
        for kind, references in KINDS.items()
        for reference in references
        for layout in LAYOUTS
    }


def fit(setting: Setting, precision: str, kind: str, reference: str, layout: str) -> dict[str, Any]:
    """Return the losses of some steps, and the largest margin of the first in nats."""
    import lightning.pytorch as pl

    from rap_lightning.callbacks import Guard
    from rap_lightning.models.policy_config import Lora, PolicyConfig

    if kind == "QLoRA" and find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes isn't installed")
    model = write_model(setting.work / "tiny", TINY, weights=torch.device("cpu"))
    pairs = write_pairs(setting.work / "tiny-pairs" / "train.jsonl", rows(4 * FIT_STEPS, 96, mixed=True))
    config = PolicyConfig(
        str(model), lora=None if kind == "full" else Lora(r=4), quantize="nf4" if kind == "QLoRA" else None,
        dtype="bfloat16" if kind == "QLoRA" and precision == "bf16-mixed" else None,
    )  # fmt: skip
    losses: list[float] = []
    margins: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            (one,) = module.passes
            losses.append(float(one.losses.mean()))
            chosen, rejected = (getattr(one.policy, side) - getattr(one.reference, side) for side in SIDES)
            margins.append(float((chosen - rejected).abs().max()))

    pl.seed_everything(0, verbose=False)  # the same batches and the same adapter in every layout
    module = _module(config, _reference(setting, reference), lr=1e-3)
    data = _data(pairs, 4, 256, layout)
    _trainer(setting, precision, FIT_STEPS, [Watch(), Guard()]).fit(module, data)
    assert module.policy is not None
    return {"losses": losses, "identity": margins[0], "attention": sorted({*module.policy.attention})}


SIDES = ("chosen", "rejected")


def _reference(setting: Setting, name: str) -> Any:
    from rap_lightning.models.references.adapters_off import AdaptersOff
    from rap_lightning.models.references.frozen import Frozen
    from rap_lightning.models.references.precomputed import Stored

    if name == "Stored":  # of a layout of its own: in bfloat16 another one's numbers differ
        return Stored(folder=str(setting.work / "stored" / str(time.monotonic_ns())))
    return {"Frozen": Frozen, "AdaptersOff": AdaptersOff}[name]()


def _module(config: Any, reference: Any, *, lr: float) -> Any:
    from rap_lightning import DPO, PreferenceModule
    from rap_lightning.training.schedules import ConstantWithWarmup

    return PreferenceModule(
        config, DPO(0.1), reference, schedule=ConstantWithWarmup(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True),
    )  # fmt: skip


def _data(pairs: Path, batch: int, length: int, layout: str) -> Any:
    from rap_lightning import PreferenceDataModule

    return PreferenceDataModule(str(pairs), goal=None, max_length=length, batch_size=batch, layout=layout)


def _trainer(setting: Setting, precision: str, steps: int, callbacks: list[Any]) -> Any:
    import lightning.pytorch as pl

    return pl.Trainer(
        accelerator=setting.device.type, devices=1, max_steps=steps, precision=precision, log_every_n_steps=10_000,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=callbacks,
        default_root_dir=setting.work,
    )  # fmt: skip


# -- shapes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A case of the shapes: what is trained on what.

    Attributes:
        shapes: the model, largest first; the first that fits is taken.
        lora: whether an adapter is trained, with the policy without it as its reference; else all weights, with
            stored log-probabilities.
        pairs: in a batch.
        length: tokens of prompt and response.
    """

    shapes: tuple[Shape, ...]
    lora: bool
    pairs: int
    length: int

    @property
    def reference(self) -> str:
        """The name of the reference."""
        return "AdaptersOff" if self.lora else "Stored"

    def bytes_of(self, shape: Shape) -> float:
        """Bytes of weights, gradients and optimizer state, and 6 GB for activations."""
        return shape.parameters() * (2.1 if self.lora else 18) + 6e9


def loads(setting: Setting) -> dict[str, Load]:
    """Return what is trained, by name."""
    full, adapted, sizes = (FULL, ADAPTED, ((4, 2048), (2, 8192)))
    if setting.toy:
        full, adapted, sizes = (TINY,), (TINY,), ((2, 64), (1, 128))
    return {
        f"{kind}, {pairs} pairs of {length:,} tokens": Load(shapes, lora, pairs, length)
        for pairs, length in sizes
        for kind, lora, shapes in (("1.5B in full", False, full), ("8B with LoRA", True, adapted))
    }


def shapes(setting: Setting) -> dict[str, Case]:
    """Optimizer steps of models as large as those that people train, with random weights."""
    return {name: partial(steps_of, setting, load) for name, load in loads(setting).items()}


def steps_of(setting: Setting, load: Load) -> dict[str, Any]:
    """Return seconds, memory, operations and synchronisations of a step beside what `plan` says."""
    from rap_lightning.callbacks import Guard
    from rap_lightning.models.policy_config import Lora, PolicyConfig

    shape = fitting(setting, load)
    # what has stored log-probabilities is known by its files, so these must exist
    weights = None if load.lora else setting.device
    folder = write_model(setting.work / shape.name.split()[0] / ("config" if load.lora else "weights"), shape,
                         weights=weights)  # fmt: skip
    meter = StepMeter(setting.device, *((1, 2, 1) if setting.toy else (2, 4, 2)))
    pairs = write_pairs(
        setting.work / f"pairs-{load.pairs}-{load.length}" / "train.jsonl", rows(load.pairs * meter.steps, load.length)
    )
    plan = start_plan(setting, load, folder, pairs)
    make = RandomWeights if load.lora else PolicyConfig
    config = make(str(folder), lora=Lora(r=16) if load.lora else None)
    module, data = _module(config, _reference(setting, load.reference), lr=1e-6), _data(
        pairs, load.pairs, load.length, "tree"
    )  # fmt: skip
    try:
        _trainer(setting, "bf16-mixed", meter.steps, [meter, Guard()]).fit(module, data)
        sizes = data._pairs[data.train_split].sizes()[: load.pairs]  # all pairs are equally long
        found = meter.found
        flops = useful_flops(module.policy, sizes, live_reference=load.lora)
        seconds, peak = found["seconds"], None if setting.gpu is None else setting.gpu.teraflops * 1e12
        return found | {
            "model": shape.name, "pair": list(sizes[0]), "pairs_per_second": load.pairs / seconds,
            "tokens_per_second": sum(map(sum, sizes)) / seconds, "teraflops": flops / seconds / 1e12,
            "mfu": None if peak is None else flops / seconds / peak, "attention": module.policy.attention,
            "plan": plan_of(plan, setting.left),
        }  # fmt: skip
    finally:
        plan.kill()
        plan.communicate()


def fitting(setting: Setting, load: Load) -> Shape:
    """Return the largest shape that fits the free memory."""
    if setting.device.type != "cuda":
        return load.shapes[0]
    free, _ = torch.cuda.mem_get_info()
    for shape in load.shapes:
        if load.bytes_of(shape) <= free:
            return shape
    least = load.bytes_of(load.shapes[-1])
    raise Skipped(f"the smallest model needs about {least / 1e9:.0f} GB, and {free / 1e9:.1f} GB are free")


def start_plan(setting: Setting, load: Load, folder: Path, pairs: Path) -> subprocess.Popen[str]:
    """Start `plan` for a case; it needs no GPU, so it runs beside the measurement's loading."""
    options = {
        "--model.policy.path": folder, "--model.reference": load.reference, "--data.source": pairs,
        "--data.goal": "null", "--data.batch_size": load.pairs, "--data.max_length": load.length,
        "--data.layout": "tree", "--trainer.precision": "bf16-mixed", "--trainer.devices": 1,
        "--trainer.accelerator": "cpu" if setting.device.type == "cpu" else "auto",
        "--export.enabled": "false",
    }  # fmt: skip
    if load.lora:
        options["--model.policy.lora.r"] = 16
    if setting.device.type == "cuda" and setting.gpu is not None:
        options |= {"--memory": setting.gpu.memory, "--teraflops": setting.gpu.teraflops}
    command = [sys.executable, "-m", "rap_lightning.cli.main", "plan", "--json"]
    return subprocess.Popen(
        [*command, *(str(part) for option in options.items() for part in option)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def plan_of(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """Return what `plan` says: GB of tensors, and seconds of a step where the GPU's peak is known; or its error."""
    try:
        out, error = process.communicate(timeout=seconds)
        document = json.loads(out.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": "plan took too long"}
    except (IndexError, json.JSONDecodeError):
        return {"error": last_line(error)}
    held = document["bytes_per_rank"]
    return {"gb": (held["total"] - held["process"]) / 1e9, "seconds": document.get("seconds_per_step")}


# -- against TRL -------------------------------------------------------------------------------------------------------

SIDES_BY_NAME = {
    "rap-lightning, stored": ["ours.py"],
    "TRL, precomputed": ["peer_trl.py", "--precompute"],
    "rap-lightning, live": ["ours.py", "--reference", "frozen"],
    "TRL, live": ["peer_trl.py"],
}


def peers(setting: Setting) -> dict[str, Case]:
    """Each side in a process of its own, in turn, on the same batches."""
    rounds = 1 if setting.toy else 2
    return {
        f"{name}, round {number + 1}": partial(side, setting, command, number)
        for number in range(rounds)
        for name, command in SIDES_BY_NAME.items()
    }


def side(setting: Setting, command: list[str], number: int) -> dict[str, Any]:
    """Return seconds of each step, without the first, and peak memory."""
    if find_spec("trl") is None:
        raise Skipped("TRL isn't installed: pip install 'trl==1.16.*'")
    load = next(iter(loads(setting).values()))
    shape = fitting(setting, load)
    steps = 3 if setting.toy else 5
    folder = write_model(setting.work / shape.name.split()[0] / "weights", shape, weights=setting.device)
    file = setting.work / "peer-rows.jsonl"
    if not file.exists():
        lines = rows(load.pairs * steps * 2, load.length, mixed=True, seed=1)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = {
        "--model": folder, "--rows": file, "--pairs-per-step": load.pairs, "--steps": steps, "--max-length":
        load.length, "--skip": number * load.pairs * steps, "--device": setting.device.type,
    }  # fmt: skip
    flags = ["--bf16", *([] if setting.toy else ["--gradient-checkpointing"])]
    try:
        found = compare.run(
            [*command, *(str(part) for option in options.items() for part in option), *flags],
            argparse.Namespace(run_with="", seconds=setting.left),
        )
    except SystemExit as error:
        raise RuntimeError(last_line(str(error))) from None
    seconds = found["wall"][compare.WARM_UP :]
    return {
        "model": shape.name, "pairs": load.pairs, "length": load.length, "seconds": seconds,
        "pairs_per_second": load.pairs / (sum(seconds) / len(seconds)), "peak_gb": found["peak_gb"],
        "losses": [log[0] for log in found["logs"]], "tokens_laid": sum(found["tokens_laid"][compare.WARM_UP :]),
    }  # fmt: skip


# -- running -----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Setting], dict[str, Case]]] = {
    "environment": environment, "attention": attention, "tests": tests, "fits": fits, "shapes": shapes, "trl": peers,
}  # fmt: skip


def last_line(text: str) -> str:
    """Return the last line of an error's output that says something."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no output"


def outcome(case: Case) -> dict[str, Any]:
    """Run a case, and return its figures, why it was skipped, or its error."""
    begun = time.perf_counter()
    try:
        found = case()
    except Skipped as reason:
        found = {"skipped": str(reason)}
    except Exception as error:
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        text = " ".join(str(error).split()) or type(error).__name__
        found = {"error": f"{kind}: {text}"[:600]}
        error.__traceback__ = None  # its frames hold tensors
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after an illegal access every call fails, until the next process
            torch.cuda.empty_cache()
    return found | {"took": round(time.perf_counter() - begun, 1)}


def run(section: str, setting: Setting, emit: Callable[[dict[str, Any]], None], done: Iterable[str] = ()) -> None:
    """Run the cases of a section that aren't done, and emit a line before the first, and around each."""
    cases = SECTIONS[section](setting)
    emit({"cases": list(cases)})
    for name in [name for name in cases if name not in set(done)]:
        emit({"begins": name})
        emit({"case": name, **_finite(outcome(cases[name]))})
        if not usable(setting.device):
            sys.exit("the device can't be used by this process any longer")


def usable(device: torch.device) -> bool:
    """Return whether a device still works for this process: after an illegal access none of its calls does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _finite(value: Any) -> Any:
    """Numbers that JSON has none for become texts."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--gpu", help="published memory (GB) and peak (TFLOPS) of the device: 141,989")
    parser.add_argument("--end", type=float, default=math.inf, help="when the process is stopped, in Unix time")
    parser.add_argument("--done", nargs="*", default=[], help="cases to leave out")
    a = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    memory, teraflops = map(float, a.gpu.split(",")) if a.gpu else (0.0, 0.0)
    gpu = GPU(memory, teraflops, 32.0, "as given") if a.gpu else None

    def emit(line: dict[str, Any]) -> None:
        with a.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    run(a.section, Setting(torch.device(a.device), a.work, a.toy, gpu, a.end), emit, a.done)


if __name__ == "__main__":
    main()
