"""What a GPU does with this package, in one command of less than eight minutes. Please send back what it writes.

    python benchmarks/gpu.py

It measures on the first GPU, section by section: the environment; which attention works; the tests that need a GPU;
short runs of every layout, kind of training and reference; steps of a 1.5B and an 8B model with random weights, beside
what `rap-lightning plan` says; and TRL on the same pairs, if it is installed. Every section has a share of the time; a
case that there is no time for, or that fails, says so, and the next one follows. Nothing is downloaded. The results are
benchmarks/results/gpu.md and gpu.json, written anew after every case. --toy runs all of it at toy sizes on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any

HERE = Path(__file__).resolve().parent
SHARES = {"environment": 2, "attention": 14, "tests": 14, "fits": 16, "shapes": 28, "trl": 26}
"""Of the time, by section; what a section leaves over goes to those after it."""
TITLES = {
    "environment": "Environment", "attention": "Attention", "tests": "Tests that need a GPU",
    "fits": "Short runs on a tiny model", "shapes": "Optimizer steps of large models", "trl": "Against TRL",
}  # fmt: skip


@dataclass
class Section:
    """The results of one section.

    Attributes:
        planned: names of its cases.
        cases: figures by case.
        seconds: that it took.
        cut: cases that there was no time for.
        note: why it ended early, if it did.
    """

    planned: list[str] = field(default_factory=list)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    cut: list[str] = field(default_factory=list)
    note: str = ""

    def read(self, file: Path) -> str | None:
        """Take over a worker's lines, and return the case that has begun and not ended."""
        begun = None
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # it is being written
                continue
            self.planned = line.get("cases", self.planned)
            begun = line.get("begins", begun)
            if "case" in line:
                self.cases[line.pop("case")] = line
                begun = None
        return begun


# -- running -----------------------------------------------------------------------------------------------------------


def run_section(
    name: str, budget: float, options: list[str], work: Path, changed: Callable[[Section], None],
    worker: tuple[str, ...] = (sys.executable, str(HERE / "gpu_cases.py")), environment: dict[str, str] | None = None,
) -> Section:  # fmt: skip
    """Run a section's cases in a process, and in another one those that are left when a case has ended it.

    Args:
        name: of the section.
        budget: seconds, after which the process is stopped.
        options: of every worker.
        work: folder for its output.
        changed: called with the results so far, whenever there are more.
        worker: the command of a worker.
        environment: variables of a worker, beside those of this process.
    """
    section, begun = Section(), monotonic()
    left = lambda: budget - (monotonic() - begun)  # noqa: E731
    lines, log = work / f"{name}.jsonl", work / f"{name}.log"
    lines.unlink(missing_ok=True)
    restarts = 0
    while True:
        before = len(section.cases)
        command = [*worker, name, str(lines), *options, "--end", f"{time() + left():.0f}"]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*command, "--done", *section.cases], stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | (environment or {}),
            )  # fmt: skip
            try:
                current = _follow(process, section, lines, left, changed)
                in_time = process.returncode is not None
            finally:  # also where the command is interrupted
                if process.returncode is None:
                    _stop(process)
        if not in_time:
            section.read(lines)
            section.note = f"stopped after {budget:.0f} s"
            break
        missing = [case for case in section.planned if case not in section.cases]
        if process.returncode == 0 and not missing:
            break
        said = _last_line(log) or f"exit code {process.returncode}"
        if current is None and len(section.cases) == before:
            section.note = f"the process ended before its first case ({process.returncode}): {said}"
            break
        if current is not None:
            # kept in the file too, for a worker's lines are read from its beginning
            entry = {"case": current, "error": f"the process ended ({process.returncode}): {said}"}
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            section.read(lines)
        restarts += 1
        if not [case for case in section.planned if case not in section.cases] or left() < 5 or restarts > 6:
            break
    section.cut = [case for case in section.planned if case not in section.cases]
    if section.cut and not section.note:
        section.note = "ended early"
    section.seconds = round(monotonic() - begun, 1)
    changed(section)
    return section


def _follow(
    process: subprocess.Popen[Any], section: Section, lines: Path, left: Callable[[], float],
    changed: Callable[[Section], None],
) -> str | None:  # fmt: skip
    """Read a worker's lines until it ends or time is over, and return the case that it was at."""
    while left() > 0:
        known = len(section.cases)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(1.0, max(0.05, left())))
        current = section.read(lines)
        if len(section.cases) > known:
            changed(section)
        if process.returncode is not None:
            return current
    return None


def _stop(process: subprocess.Popen[Any]) -> None:
    """End a worker and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_line(log: Path) -> str:
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return said[-1][:300] if said else ""


# -- the GPU's published figures ---------------------------------------------------------------------------------------

NAMES = {
    "A100-SXM4-40GB": "a100-40gb", "A100-PCIE-40GB": "a100-40gb", "A100-SXM4-80GB": "a100-80gb",
    "A100 80GB PCIe": "a100-80gb", "H100 80GB HBM3": "h100-80gb", "H100 PCIe": "h100-pcie", "H200": "h200",
    "B200": "b200", "MI300X": "mi300x", "L40S": "l40s", "L4": "l4", "A10": "a10", "GeForce RTX 4090": "rtx-4090",
}  # fmt: skip
"""What ends a device's name as the driver says it, and its name in `plan`'s table."""


def published(device: str) -> str | None:
    """Return a device's name in `plan`'s table; None for one that isn't there, and for a slice of a GPU (MIG).

    >>> published("NVIDIA H100 80GB HBM3"), published("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), published("NVIDIA A10G")
    ('h100-80gb', None, None)
    """
    return next((known for end, known in NAMES.items() if device.endswith(f" {end}")), None)


def figures_of(device: str, given: float | None) -> str | None:
    """Return memory and peak for the workers, "141,989"; ``given`` TFLOPS take precedence."""
    from rap_lightning.planning.gpus import GPUS

    known = published(device)
    if given is not None:
        import torch

        return f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f},{given}"
    return None if known is None else f"{GPUS[known].memory},{GPUS[known].teraflops}"


# -- report ------------------------------------------------------------------------------------------------------------


def table(head: str, lines: Iterable[Iterable[Any]]) -> list[str]:
    """Return a table; a column whose title ends with a colon is aligned to the right."""
    titles = head.split("|")
    rule = ["---:" if title.endswith(":") else "---" for title in titles]
    rows = [[title.rstrip(":") for title in titles], rule, *lines]
    return ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def failure(case: dict[str, Any]) -> str | None:
    """Return why a case has no figures."""
    if "skipped" in case:
        return f"skipped: {case['skipped']}"
    return f"**failed**: {case['error']}" if "error" in case else None


def environment_lines(section: Section) -> list[str]:
    """A line for each fact."""
    return table("|", (fact for case in section.cases.values() for fact in case.items() if fact[0] != "took"))


def attention_lines(section: Section) -> list[str]:
    """What was chosen for each kind of layer, and what ran."""
    lines = []
    for name, case in section.cases.items():
        ran = failure(case) or (f"**{case['ran']}**: {'; '.join(case['why'])}" if case["failed"] else case["ran"])
        lines.append([name, case.get("chosen"), ran, case.get("took")])
    return [
        "Output and gradients of each path are compared with masked attention's on a small tree before it is used.", "",
        *table("layer|chosen|ran|s, compiling included:", lines),
    ]  # fmt: skip


def tests_lines(section: Section) -> list[str]:
    """How many passed, and what the others say."""
    lines: list[str] = []
    for case in section.cases.values():
        if said := failure(case):
            lines.append(said)
            continue
        outcomes = case["outcomes"]
        others = {name: said for name, said in outcomes.items() if said != "passed"}
        stopped = f"; {case['stopped']}" if case["stopped"] else ""
        lines.append(f"{len(outcomes) - len(others)} of {len(outcomes)} tests passed{stopped}.")
        lines += ["", *(f"- `{name}`: {said}" for name, said in others.items())] if others else []
    return lines


def fit_verdict(name: str, cases: dict[str, dict[str, Any]], bound: float) -> tuple[str, str, str]:
    """(largest margin at step 0, largest difference of a loss from the padded layout's, verdict) of a run."""
    case = cases[name]
    padded = cases.get(name.rpartition(", ")[0] + ", padded", {})
    identity = float(case["identity"])
    if "losses" not in padded:
        return f"{identity:.1e}", "", "ok" if identity <= bound else "**differs**"
    off = max(abs(float(a) - float(b)) for a, b in zip(case["losses"], padded["losses"], strict=True))
    return f"{identity:.1e}", f"{off:.1e}", "ok" if identity <= bound and off <= bound else "**differs**"


FIT_BOUNDS = {"32-true": 1e-3, "bf16-mixed": 0.1}
"""Nats that a margin at step 0, or a loss, may differ by. In bfloat16 sums over a response differ by rounding."""


def fits_lines(section: Section) -> list[str]:
    """A line for each run."""
    lines = []
    for name, case in section.cases.items():
        if said := failure(case):
            lines.append([name, said, "", "", ""])
            continue
        identity, off, verdict = fit_verdict(name, section.cases, FIT_BOUNDS[name.partition(",")[0]])
        lines.append([name, verdict, identity, off, "; ".join(case["attention"])])
    bounds = " and ".join(f"{bound:g} with {name}" for name, bound in FIT_BOUNDS.items())
    return [
        "Three steps of four pairs. At step 0 policy and reference are the same model, so that every margin is 0 nats; "
        f"losses equal those of the padded layout. A run is ok up to {bounds}.", "",
        *table("run||largest margin at step 0:|largest difference from padded:|attention", lines),
    ]  # fmt: skip


def shapes_lines(section: Section) -> list[str]:
    """A line for each model and length, with the plan's figures beside the measured ones."""
    from gpu_steps import FORMULA

    lines, waits = [], []
    for name, case in section.cases.items():
        if said := failure(case):
            lines.append([name, said])
            continue
        plan = case["plan"]
        planned = plan.get("error") or f"{plan['gb']:.1f}"
        time_planned = "" if plan.get("seconds") is None else f"{plan['seconds']:.3f}"
        lines.append([
            name, case["model"], f"{case['pairs_per_second']:.3g}", f"{case['tokens_per_second']:,.0f}",
            f"{case['seconds']:.3f}", time_planned, f"{case['peak_gb']:.1f}", planned,
            f"{case['teraflops']:.3g}", "" if case["mfu"] is None else f"{case['mfu']:.1%}",
            case["synchronisations"], case["recompiles"], "; ".join(case["attention"]),
        ])  # fmt: skip
        waits += [f"- {name}: " + ", ".join(f"{place} ({count})" for place, count in case["waits"].items())]
    head = (
        "run|model|pairs/s:|useful tokens/s:|s per step:|planned s:|peak GB:|planned GB:|useful TFLOP/s:|MFU:|"
        "waits per step:|recompiles:|attention"
    )
    said = [f"Where the host waited for the device, in all counted steps:\n\n{chr(10).join(waits)}"] if waits else []
    return [
        "bf16-mixed, layout tree, prompts half of the tokens, random weights; all weights trained with stored "
        "log-probabilities, or LoRA of rank 16 with the policy without it as its reference. Peak: torch's allocations "
        "in the timed steps; planned: what `plan` says without its line for the process.", "", *table(head, lines), "",
        FORMULA, *(["", *said] if said else []),
    ]  # fmt: skip


def trl_lines(section: Section) -> list[str]:
    """Each side's figures, and TRL's time and memory in times of ours on the same batches."""
    lines, sides = [], dict[str, list[dict[str, Any]]]()
    for name, case in section.cases.items():
        if said := failure(case):
            lines.append([name, said])
            continue
        sides.setdefault(name.rpartition(",")[0], []).append(case)
        median = statistics.median(case["seconds"])
        losses = " ".join(f"{float(loss):.4f}" for loss in case["losses"])
        lines.append([
            name, f"{case['pairs_per_second']:.3g}", f"{median:.3f}", case["peak_gb"], f"{case['tokens_laid']:,}",
            losses,
        ])  # fmt: skip
    one = next((case for case in section.cases.values() if "pairs" in case), None)
    what = "" if one is None else (
        f"{one['model']}, all weights trained in bf16-mixed, {one['pairs']} pairs a step, prompts and responses of "
        f"{one['length'] // 8} to {one['length'] // 2} tokens, activations computed again. Each side in a process of "
        "its own, in turn; the first step is not counted. TRL uses flash-attn where it is installed; its padding_free "
        "is disabled in DPO (1.16), and it has no packing there."
    )  # fmt: skip
    return [what, "", *table("side|pairs/s:|s per step:|peak GB:|tokens laid out:|losses", lines), "", *_ratios(sides)]


def _ratios(sides: dict[str, list[dict[str, Any]]]) -> list[str]:
    """TRL's step time over ours, batch by batch."""
    found = []
    for theirs, ours in (("precomputed", "stored"), ("live", "live"), ("live", "stored")):
        peer, own = sides.get(f"TRL, {theirs}", []), sides.get(f"rap-lightning, {ours}", [])
        each = [t / o for p, q in zip(peer, own, strict=False) for t, o in zip(p["seconds"], q["seconds"], strict=True)]
        if each:
            found.append(
                f"- TRL {theirs} takes {statistics.median(each):.2f} times ({min(each):.2f}-{max(each):.2f}) as long a "
                f"step as rap-lightning {ours}, and {peer[0]['peak_gb'] / own[0]['peak_gb']:.2f} times the memory."
            )
    return found


LINES: dict[str, Callable[[Section], list[str]]] = {
    "environment": environment_lines, "attention": attention_lines, "tests": tests_lines, "fits": fits_lines,
    "shapes": shapes_lines, "trl": trl_lines,
}  # fmt: skip


def report(found: dict[str, Section], *, toy: bool, minutes: float) -> str:
    """Return the page."""
    took = sum(section.seconds for section in found.values())
    lines = [
        "# On a GPU" if not toy else "# A trial at toy sizes on a CPU: no figure here says anything about speed",
        "",
    ]
    lines += [f"`python benchmarks/gpu.py`, {took:.0f} s of at most {60 * minutes:.0f} s.", ""]
    for name, section in found.items():
        lines += [f"## {TITLES[name]}", ""]
        if section.note:
            cut = f" Not measured: {'; '.join(section.cut)}." if section.cut else ""
            lines += [f"This section was {section.note}.{cut}" if section.cut else f"Note: {section.note}.", ""]
        lines += [*LINES[name](section), ""]
    return "\n".join(lines)


def summary(found: dict[str, Section]) -> list[str]:
    """Return a line for each section, and each failure."""
    lines = []
    for name, section in found.items():
        failed = {
            case: said for case, result in section.cases.items() if (said := failure(result)) and "error" in result
        }
        skipped = sum("skipped" in result for result in section.cases.values())
        counts = f"{len(section.cases) - len(failed) - skipped} measured, {skipped} skipped, {len(failed)} failed"
        lines.append(f"{TITLES[name]}: {counts}, {len(section.cut)} cut, {section.seconds:.0f} s")
        lines += [f"  {case}: {said}" for case, said in failed.items()]
    return lines


def write(found: dict[str, Section], out: Path, *, toy: bool, minutes: float) -> None:
    """Write page and figures, each complete or not at all."""
    from rap_lightning.atomic_write import atomic_file

    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": 1, "toy": toy, "sections": {name: asdict(section) for name, section in found.items()}}
    for path, text in (
        (out.with_suffix(".json"), json.dumps(document, indent=1) + "\n"),
        (out, report(found, toy=toy, minutes=minutes)),
    ):
        with atomic_file(path) as file:
            file.write(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="all of it at toy sizes, on a CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="limit of the whole (7.5)")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="sections to run, beside the environment")
    parser.add_argument("--teraflops", type=float, help="dense bfloat16 peak of a GPU that isn't in plan's table")
    parser.add_argument("--work", type=Path, help="folder for 4 GB of models; by default one in TMPDIR")
    parser.add_argument("--out", type=Path, help="the page to write, and its .json beside it")
    a = parser.parse_args(arguments)
    if a.minutes <= 0:
        parser.error(f"--minutes must be above 0, found {a.minutes:g}")
    if a.toy and a.teraflops is not None:
        parser.error("--teraflops has no effect with --toy, which measures no GPU")
    import torch

    if not a.toy and not torch.cuda.is_available():
        print("gpu.py: torch sees no GPU. On a machine with one, check nvidia-smi and torch.version.cuda; "
              "--toy tries the command on a CPU.", file=sys.stderr)  # fmt: skip
        return 2
    work = Path(tempfile.mkdtemp(prefix="rap-gpu-", dir=a.work))
    out = a.out or (work.parent / "gpu-toy.md" if a.toy else HERE / "results" / "gpu.md")
    try:
        found = run_all(a, work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n".join([*summary(found), f"written: {out} and {out.with_suffix('.json')}"]))
    return 0


def run_all(a: argparse.Namespace, work: Path, out: Path) -> dict[str, Section]:
    """Run the sections, each within its share of the time that is left, and write after every case."""
    found: dict[str, Section] = {}
    end = monotonic() + 60 * a.minutes
    options = ["--device", "cpu" if a.toy else "cuda", "--work", str(work), *(["--toy"] if a.toy else [])]
    # TRL would train on all devices that it sees; what else there is, the environment says
    first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    names = [name for name in SHARES if name == "environment" or a.only is None or name in a.only]
    for number, name in enumerate(names):
        # the first section gets at least a fifth of the time, since imports take long
        share = max(SHARES[name] / sum(SHARES[later] for later in names[number:]), 0.2 if number == 0 else 0.0)
        budget = (end - monotonic()) * share

        def changed(section: Section, name: str = name) -> None:
            found[name] = section
            write(found, out, toy=a.toy, minutes=a.minutes)

        print(f"{TITLES[name]}, up to {budget:.0f} s ...", flush=True)
        run_section(name, budget, options, work, changed, environment=None if name == "environment" else first)
        if name == "environment" and not a.toy:
            device = found[name].cases.get("environment", {}).get("device", "")
            figures = figures_of(device, a.teraflops)
            options += [] if figures is None else ["--gpu", figures]
    return found


if __name__ == "__main__":
    sys.exit(main())
