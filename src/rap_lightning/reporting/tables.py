"""The tables of the page: headline figures, samples, data, configs, cost, versions, and what is missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from rap_lightning.provenance import CHIEF
from rap_lightning.reporting.charts import with_interval
from rap_lightning.reporting.config_differences import differences
from rap_lightning.reporting.evaluation_file import SampledText, difference
from rap_lightning.reporting.read_runs import Run, as_dict
from rap_lightning.reporting.sections import Section, evaluated
from rap_lightning.reporting.text import as_number, clean, duration, listed, number, size

Rows = list[list[str]]
Table = tuple[list[str], Rows]
"""Head and rows."""

PROMPTS, GOALS = 3, 4
"""How many prompts and goals are shown side by side."""

COMPARABLE = (
    "judge", "temperature", "top_p", "max_new_tokens", "prompts", "split", "samples_per_prompt", "seed"
)  # fmt: skip
"""Scores of evaluations that differ in one of these are not compared."""

MODES = {
    "both": "pairs at both goals", "half": "half of the prompts at both goals", "chosen": "pairs at the chosen goal",
    "rejected": "pairs at the rejected goal", "none": "plain pairs, no goals",
}  # fmt: skip
COUNTS = {"rows_read": "rows read", "pairs_kept": "pairs kept", "relabelled_pairs": "training pairs"}
REASONS = {
    "dropped": "dropped", "truncated": "truncated", "repaired": "repaired", "left_out": "left out", "noted": "noted",
    "faults": "fault",
}  # fmt: skip


# --- headline --------------------------------------------------------------------------------------------------------


def headline(runs: list[Run]) -> Table:
    """Return the main figures of each run; differences are paired by prompt, from the first evaluated run."""
    first = next((run for run, _ in evaluated(runs)), None)
    compare = first is not None and not differing_settings(runs)
    rows = []
    for run in runs:
        score = spearman = slope = "not evaluated" if run.evaluation is None else "–"
        apart = "–"
        if run.evaluation is not None:
            goal, figure = run.evaluation.at_best_goal()
            at = "no goal" if goal is None else f"goal {number(goal)}"
            score = f"{with_interval(figure)} at {at}" if figure.value is not None else with_interval(figure)
            spearman, slope = (
                with_interval(run.evaluation.figure("controllability", "sampled", name))
                for name in ("spearman", "slope")
            )
            if compare and run is not first:
                apart = _apart(run, first)
        accuracy = run.curves.last("val/rewards/accuracies") if run.curves is not None else None
        rows.append([
            run.name, describe(run), f"{run.step:,}" if run.step else "–", score, apart, spearman, slope,
            number(accuracy, percent=True),
        ])  # fmt: skip
    against = f"difference from {first.name}" if first is not None else "difference"
    head = ["run", "method", "steps", "score at the best goal", against, "Spearman", "slope", "held-out accuracy"]
    return head, rows


def _apart(run: Run, first: Run | None) -> str:
    """Return the paired difference of the scores at each run's best goal."""
    if run.evaluation is None or first is None or first.evaluation is None:
        return "–"
    (goal, _), (other, _) = run.evaluation.at_best_goal(), first.evaluation.at_best_goal()
    found = difference(run.evaluation.scores.get(goal, {}), first.evaluation.scores.get(other, {}))
    return f"{with_interval(found)}, {found.n} prompts" if found.value is not None else with_interval(found)


def differing_settings(runs: list[Run]) -> list[str]:
    """Return the settings in which the evaluations differ, with their values."""
    settings: dict[str, Callable[[Run], Any]] = {
        "scale": lambda run: run.scale,
        "best goal": lambda run: max(run.evaluation.goals, default=None) if run.evaluation else None,
        "guidance": lambda run: (run.evaluation.guidance or "none") if run.evaluation else None,
    }
    settings |= {name: lambda run, name=name: run.evaluation.get(name) for name in COMPARABLE}  # type: ignore[misc]
    found = []
    for name, value_of in settings.items():
        values = [(run, value) for run, _ in evaluated(runs) if (value := value_of(run)) is not None]
        if len({str(value) for _, value in values}) > 1:
            shown = listed([f"{clean(value, 60)} ({run.name})" for run, value in values])
            found.append(f"{name.replace('_', ' ')}: {shown}")
    return found


def describe(run: Run) -> str:
    """Return what a run is, in a few words."""
    if not run.facts:
        return "an evaluation without a run" if run.curves is None else "unknown"
    adapter = run.facts.get("adapter")
    words = [
        _one_line(str(as_dict(run.facts.get("loss")).get("shown", ""))),
        MODES.get(run.relabel or "", ""),
        f"LoRA r={as_dict(adapter).get('r')}" if adapter else "",
        f"from {run.base}" if run.base else "",
    ]
    return clean(", ".join(filter(None, words)), 300)


def _one_line(shown: str) -> str:
    """Return a module's repr as ``Mixture(DPO(beta=0.1), SFT(), weights=[1.0, 0.2])``; torch writes several lines."""
    first, *rest = [line.strip() for line in shown.splitlines()] or [""]
    losses = [re.sub(r"^\(\d+\): ", "", line) for line in rest if re.match(r"\(\d+\): ", line)]
    options = [line for line in rest if line[:1] not in ("(", ")")]
    return f"{first}{', '.join([*losses, *options])})" if rest else first


def notes(runs: list[Run]) -> list[str]:
    """Return what a reader must know before comparing the runs."""
    found = [f"{run.name}: {note}." for run in runs for note in run.notes]
    if differing := differing_settings(runs):
        found.append(f"The evaluations differ in {'; '.join(differing)}. Their scores are not compared.")
    shown = {str(one.get("model")) for _, one in evaluated(runs)}
    for run, one in evaluated(runs):
        if (base := one.get("base")) and str(base) not in shown:
            shown.add(str(base))
            found.append(
                f"The base model {clean(base)} is not on this page; part of the steering may be its own. Evaluate it "
                f"with the same options, but --model {clean(base)} --goal_from {run.folder / 'hf'} --output OUTPUT."
            )
    for run in runs:
        for session in run.sessions:
            for other in runs:
                if session.folder is not None and session.folder.resolve() == other.folder.resolve():
                    found.append(f"{run.name} was resumed from step {session.end:,} of {other.name}: up to there they "
                                 "are one run.")  # fmt: skip
    for what, values in (
        ("optimizer steps", [run.step for run in runs]),
        ("base models", [run.base for run in runs]),
        ("goal templates", [run.goal.get("template") for run in runs]),
        ("kinds of held-out pairs (relabelling), so accuracies don't compare", [run.relabel for run in runs]),
    ):
        known = dict.fromkeys(f"{value:,}" if isinstance(value, int) else str(value) for value in values if value)
        if len(known) > 1:
            found.append(f"The runs have different {what}: {listed([clean(value, 80) for value in known])}.")
    if len(runs) > 1 and any(evaluated(runs)):
        found.append("Intervals are over prompts; the variation between seeds is not in them.")
    return found


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideBySide:
    """Samples of one prompt: (goal, one response per run that has samples), goals low to high."""

    prompt: str
    goals: list[tuple[str, list[tuple[int, str, str] | None]]]


def samples(runs: list[Run]) -> tuple[list[SideBySide], int]:
    """Return the samples to show and the number of prompts: the first of each prompt and goal, not the best."""
    of_run = {run.index: found for run in runs if (found := _samples_of(run))}
    by_prompt: dict[str, dict[float | None, dict[int, SampledText]]] = {}
    for index, found in of_run.items():
        for one in found:
            by_prompt.setdefault(one.prompt, {}).setdefault(one.goal, {}).setdefault(index, one)
    most_shared = sorted(by_prompt, key=lambda prompt: -sum(map(len, by_prompt[prompt].values())))
    shown = []
    for prompt in most_shared[:PROMPTS]:
        by_goal = by_prompt[prompt]
        goals = sorted(goal for goal in by_goal if goal is not None)
        spread = sorted({goals[round(i * (len(goals) - 1) / (GOALS - 1))] for i in range(GOALS)}) if goals else []
        chosen: list[float | None] = [*([None] if None in by_goal else []), *spread]
        cells = [
            ("no goal" if goal is None else f"goal {number(goal)}",
             [_cell(by_goal[goal].get(index), index) for index in of_run])
            for goal in chosen
        ]  # fmt: skip
        shown.append(SideBySide(clean(prompt), cells))
    return shown, len(by_prompt)


def _samples_of(run: Run) -> list[SampledText]:
    """Return the samples of the evaluation, or else those of the GoalSamples callback."""
    return (run.evaluation.samples() if run.evaluation is not None else []) or run.samples


def _cell(one: SampledText | None, run: int) -> tuple[int, str, str] | None:
    if one is None:
        return None
    length = f", {one.tokens:,} tokens" if one.tokens is not None else ""
    return run, clean(one.response), (f"score {number(one.score)}" if one.score is not None else "not scored") + length


# --- data, configs, cost, versions -----------------------------------------------------------------------------------


def data_rows(runs: list[Run]) -> Table:
    """Return the counts of the data reports."""
    rows = [
        [run.name, clean(part.get("split", ""), 40), *(_count(part.get(key)) for key in COUNTS), _reasons(part)]
        for run in runs
        for part in run.data
    ]
    return ["run", "split", *COUNTS.values(), "reasons"], rows


def _reasons(part: dict[str, Any]) -> str:
    found = [
        f"{_count(as_dict(tally).get('count'))} {word}: {clean(reason, 200)}"
        for kind, word in REASONS.items()
        for reason, tally in as_dict(part.get(kind)).items()
    ]
    return "; ".join(found) or "nothing dropped, repaired or truncated"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def config_rows(runs: list[Run]) -> Table:
    """Return the config keys in which the runs differ, with the value in each run."""
    having = [run for run in runs if run.config]
    found = differences([run.config for run in having])
    return ["key", *(run.name for run in having)], [[key, *values] for key, values in found]


def cost_rows(runs: list[Run]) -> Table:
    """Return time, speed, memory and devices of each run; a dash for what was not recorded."""
    head = ["run", "wall time of fit", "pairs/s (median)", "tokens/s (median)", "peak process memory",
            "peak device memory", "devices", "evaluation"]  # fmt: skip
    rows = []
    for run in runs:
        wall = "–"
        if run.wall_time is not None:
            sessions, seconds = run.wall_time
            wall = duration(seconds) + (f" ({sessions})" if sessions else "")
        logged = run.curves.values if run.curves is not None else {}
        speeds = [
            number(median([value for _, value in logged[name]])) if name in logged else "–"
            for name in ("pairs_per_second", "tokens_per_second")
        ]
        records = [session.record for session in run.sessions] + [run.record]
        memory = []
        for key in ("host_bytes", "device_bytes"):
            peaks = [as_number(as_dict(record.get("peak_memory")).get(key)) for record in records]
            memory.append(size(max(known)) if (known := [peak for peak in peaks if peak]) else "–")
        devices = run.record.get("devices")
        on = clean(", ".join(sorted(set(map(str, devices)))), 60) if isinstance(devices, list) else "–"
        processes = run.record.get("processes", 1)
        on += f", {processes} processes" if processes != 1 else ""
        seconds_evaluating = as_number(run.evaluation.get("seconds")) if run.evaluation is not None else None
        rows.append([run.name, wall, *speeds, *memory, on, duration(seconds_evaluating) if seconds_evaluating else "–"])
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] != "–" for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows] if len(kept) > 1 else []


def version_rows(runs: list[Run]) -> tuple[Table, list[tuple[str, str]]]:
    """Return the versions that differ between the runs, as a table, and the main ones that they have in common."""
    having = [run for run in runs if run.record]
    packages = (name for run in having for name in as_dict(run.record.get("packages")))
    rows, common = [], []
    for name in dict.fromkeys(["python", "git commit", *CHIEF, *packages]):
        values = [_version(run, name) for run in having]
        if len(set(values)) > 1:
            rows.append([clean(name, 60), *values])
        elif values and values[0] != "–" and name in ("python", "git commit", *CHIEF):
            common.append((name, values[0]))
    return (["package", *(run.name for run in having)], rows), common


def _version(run: Run, name: str) -> str:
    if name == "python":
        return clean(run.record.get("python", "–"), 60)
    if name == "git commit":
        git = as_dict(run.record.get("git")) or as_dict(run.record.get("rap_lightning_git"))
        return f"{str(git['commit'])[:10]}{', modified' if git.get('dirty') else ''}" if "commit" in git else "–"
    return clean(as_dict(run.record.get("packages")).get(name, "–"), 60)


# --- what is missing -------------------------------------------------------------------------------------------------


def missing(runs: list[Run], sections: list[Section]) -> Iterator[tuple[str, str]]:
    """Yield what the page lacks, and the command that writes it (empty where there is none)."""
    for run in runs:
        if run.evaluation is None:
            yield f"{run.name} has not been evaluated.", evaluate_command(run)
    if any(evaluated(runs)):
        for section in sections:
            if section.empty and section.name != "training":
                yield f"{section.title}: no evaluation has figures for it.", ""
            for reason in section.unknown:
                yield f"{section.title}, {reason}.", ""
    if not any(run.curves is not None and run.curves.values for run in runs):
        yield "Training curves: no run has values in a metrics.csv, which fit writes.", ""
    for run in runs:
        if run.curves is not None and run.curves.values and not any(n.startswith("val/") for n in run.curves.values):
            yield (
                f"{run.name} has no validation metrics: its data have no test or validation split, "
                f"--trainer.limit_val_batches is 0, or it ended at step {run.step or 0:,} before "
                "--trainer.val_check_interval.",
                "",
            )
    for name, callback, what in (
        ("samples.jsonl", "GoalSamples", "Scores during training"),
        ("likelihood.jsonl", "LikelihoodProbe", "Likelihoods during training"),
    ):
        if not any((run.folder / name).is_file() for run in runs):
            yield (
                f"{what}: no run has a {name}, which a callback writes.",
                f"rap-lightning fit --config CONFIG --trainer.callbacks+=rap_lightning.callbacks.{callback}",
            )
    for name, having in (
        ("data_report.json", [run.data for run in runs]),
        ("config.yaml", [run.config for run in runs]),
        ("run.json", [run.record for run in runs]),
    ):
        if not any(having):
            yield f"No run has a {name}, which fit writes.", ""


def evaluate_command(run: Run) -> str:
    """Return the command that evaluates a run, on its own data and with the judge of its callbacks if it has one."""
    data = as_dict(run.config.get("data"))
    source = as_dict(data.get("init_args", data)).get("source")
    judge = "--judge RewardModel --judge.model MODEL"
    for callback in as_dict(run.config.get("trainer")).get("callbacks") or []:
        named = as_dict(as_dict(callback).get("init_args")).get("judge")
        if isinstance(named, str):
            judge = f"--judge Function --judge.function {shlex.quote(named)}"
    source = shlex.quote(source) if isinstance(source, str) else "SCORED-DATA"
    return f"rap-lightning evaluate --model {shlex.quote(str(run.folder / 'hf'))} --source {source} {judge}"
