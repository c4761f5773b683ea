"""The parts of the page that are words and tables: runs, samples, data, configs, cost, versions."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from rap_lightning.provenance import CHIEF
from rap_lightning.reporting.differences import differences
from rap_lightning.reporting.evaluation import Sample
from rap_lightning.reporting.headline import describe
from rap_lightning.reporting.panels import estimate
from rap_lightning.reporting.read_runs import Run, as_dict
from rap_lightning.reporting.text import clean, duration, listed, number, size

ByValue = tuple[str, list[tuple[str, list[int]]]]
"""A key, and each of its values with the runs that have it."""

PROMPTS, GOALS = 3, 4
"""How many are shown side by side."""

COUNTS = {"rows_read": "rows read", "pairs_kept": "pairs kept", "relabelled_pairs": "training pairs"}
REASONS = {
    "dropped": "dropped", "truncated": "truncated", "repaired": "repaired", "left_out": "left out", "noted": "noted",
    "faults": "fault",
}  # fmt: skip


def run_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """A card per run: what it is, how far it came, and its chief figures."""
    rows = []
    for run in runs:
        figures = [("optimizer steps", f"{run.step:,}" if run.step else "–")]
        found = run.evaluation
        if found is not None and found.sampled is not None and found.goals:
            best = found.goals.index(max(found.goals))
            figures.append((f"score at goal {number(found.goals[best])}", estimate(found.sampled.mean[best])))
        accuracy = run.curves.last("val/rewards/accuracies") if run.curves is not None else None
        if accuracy is not None:
            figures.append(("held-out pairs ranked right", number(accuracy, True)))
        if run.sessions:
            told = listed([f"{session.end:,}" for session in run.sessions])
            figures.append(("sessions", f"{len(run.sessions) + 1:,}, going on at step {told}"))
        if run.wall_time is not None:
            figures.append((f"wall time{run.wall_time[0]}", duration(run.wall_time[1])))
        badge = "" if run.record.get("finished") is not None or not run.record else "not finished"
        badge = badge if run.stopped is None else f"stopped at step {run.stopped[0]:,}"
        folders = [str(one.folder) for one in run.sessions if one.folder is not None] + [str(run.folder)]
        rows.append({
            "run": run.index, "name": run.name, "what": describe(run), "figures": figures, "badge": badge,
            "folders": folders, "base": as_dict(run.facts.get("base_model")).get("name"),
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class SideBySide:
    """Samples of one prompt: goals low to high, each with a sample per run (None where a run has none)."""

    prompt: str
    goals: list[tuple[str, list[tuple[int, str, str] | None]]]


def samples(runs: list[Run]) -> tuple[list[SideBySide], str]:
    """Samples to show, and which of how many they are: the first of each kind, not the best."""
    of_run = {run.index: _samples_of(run) for run in runs}
    of_run = {index: found for index, found in of_run.items() if found}
    if not of_run:
        return [], ""
    by_prompt: dict[str, dict[float | None, dict[int, Sample]]] = {}
    for index, found in of_run.items():
        for one in found:
            by_prompt.setdefault(one.prompt, {}).setdefault(one.goal, {}).setdefault(index, one)
    common = sorted(by_prompt, key=lambda prompt: -_shared(by_prompt[prompt]))  # stable: else in the file's order
    shown = []
    for prompt in common[:PROMPTS]:
        goals = sorted(goal for goal in by_prompt[prompt] if goal is not None)
        few: list[float | None] = [None] if None in by_prompt[prompt] else []
        few += sorted({goals[round(i * (len(goals) - 1) / (GOALS - 1))] for i in range(GOALS)}) if goals else []
        cells = [
            (
                "no score" if goal is None else number(goal),
                [_cell(by_prompt[prompt][goal].get(i), i) for i in sorted(of_run)],
            )
            for goal in few
        ]
        shown.append(SideBySide(clean(prompt), cells))
    greedy = all(one.greedy for found in of_run.values() for one in found)
    told = (
        f"{len(shown)} of {len(by_prompt):,} prompts, up to {GOALS} goals each; the first sample of each, not the best"
    )
    return shown, told + (", by greedy decoding." if greedy else ".")


def _samples_of(run: Run) -> list[Sample]:
    """Of the evaluation where it has any, those that were drawn before greedy ones; else what fit left."""
    evaluated = run.evaluation.samples if run.evaluation is not None else []
    return [one for one in evaluated if not one.greedy] or evaluated or run.samples


def _shared(goals: dict[float | None, dict[int, Sample]]) -> int:
    return sum(len(by_run) for by_run in goals.values())


def _cell(one: Sample | None, run: int) -> tuple[int, str, str] | None:
    if one is None:
        return None
    length = f", {one.tokens:,} tokens" if one.tokens is not None else ""
    return run, clean(one.response), (f"score {number(one.score)}" if one.score is not None else "not scored") + length


def data_groups(runs: list[Run]) -> list[dict[str, Any]]:
    """The data reports, runs with the same one together."""
    groups: list[tuple[list[dict[str, Any]], list[int]]] = []
    for run in runs:
        if not run.data:
            continue
        same = next((members for report, members in groups if report == run.data), None)
        if same is None:
            groups.append((run.data, [run.index]))
        else:
            same.append(run.index)
    return [{"runs": members, "splits": [_split(part) for part in report]} for report, members in groups]


def _split(part: dict[str, Any]) -> dict[str, Any]:
    counts = [
        (label, f"{part[key]:,}" if isinstance(part.get(key), int) else "–")
        for key, label in COUNTS.items()
    ]  # fmt: skip
    reasons = []
    for kind, word in REASONS.items():
        for reason, tally in as_dict(part.get(kind)).items():
            count = as_dict(tally).get("count", 0)
            reasons.append((word, f"{count:,}" if isinstance(count, int) else "–", clean(reason, 200)))
    return {"name": clean(part.get("split", ""), 40), "counts": counts, "reasons": reasons}


def config_rows(runs: list[Run]) -> tuple[list[int], list[ByValue]]:
    """The runs that have a config, and the keys in which they differ."""
    having = [run for run in runs if run.config]
    if len(having) < 2:
        return [run.index for run in having], []
    found = differences([run.config for run in having])
    return [run.index for run in having], [(key, _by_value(values, having)) for key, values in found]


def _by_value(values: list[str], runs: list[Run]) -> list[tuple[str, list[int]]]:
    """The different values, each with the runs that have it."""
    members: dict[str, list[int]] = {}
    for value, run in zip(values, runs, strict=True):
        members.setdefault(value, []).append(run.index)
    return list(members.items())


def cost_rows(runs: list[Run]) -> list[tuple[int, list[tuple[str, str]]]]:
    """Wall time, speed and memory of each run; only what was recorded."""
    rows = []
    for run in runs:
        found: list[tuple[str, str]] = []
        if run.wall_time is not None:
            found.append((f"wall time of fit{run.wall_time[0].replace(' of', ',', 1)}", duration(run.wall_time[1])))
        if run.curves is not None:
            for name, label in (
                ("pairs_per_second", "pairs a second (median)"),
                ("tokens_per_second", "tokens a second (median)"),
            ):
                if values := [value for _, value in run.curves.values.get(name, [])]:
                    found.append((label, number(median(values))))
        records = [session.record for session in run.sessions] + [run.record]
        memories = [as_dict(record.get("peak_memory")) for record in records]
        for key, label in (("host_bytes", "peak memory of the process"), ("device_bytes", "peak memory of the device")):
            if peaks := [memory[key] for memory in memories if isinstance(memory.get(key), int | float)]:
                found.append((label, size(max(peaks))))
        devices = run.record.get("devices")
        if isinstance(devices, list) and devices:
            processes = run.record.get("processes", 1)
            told = f"{processes} processes" if processes != 1 else "one process"
            found.append(("on", f"{clean(', '.join(sorted(set(map(str, devices)))), 60)}, {told}"))
        seconds = run.evaluation.about.get("seconds") if run.evaluation is not None else None
        if isinstance(seconds, int | float):
            found.append(("evaluation", duration(seconds)))
        if found:
            rows.append((run.index, found))
    return rows


def version_rows(runs: list[Run]) -> tuple[list[int], list[ByValue], list[tuple[str, str]]]:
    """Versions that the runs have in common, and rows of those in which they differ."""
    having = [run for run in runs if run.record]
    names = [
        "python",
        "git commit",
        *dict.fromkeys([*CHIEF, *(n for run in having for n in as_dict(run.record.get("packages")))]),
    ]
    differing: list[ByValue] = []
    common: list[tuple[str, str]] = []
    for name in names:
        values = [_version(run, name) for run in having]
        if len(set(values)) > 1:
            differing.append((clean(name, 60), _by_value([clean(value, 60) for value in values], having)))
        elif values and values[0] != "–" and name in ("python", "git commit", *CHIEF):
            common.append((name, clean(values[0], 60)))
    return [run.index for run in having], differing, common


def _version(run: Run, name: str) -> str:
    if name == "python":
        return str(run.record.get("python", "–"))
    if name == "git commit":
        git = as_dict(run.record.get("git")) or as_dict(run.record.get("rap_lightning_git"))
        return f"{str(git['commit'])[:10]}{', with changes' if git.get('dirty') else ''}" if "commit" in git else "–"
    return str(as_dict(run.record.get("packages")).get(name, "–"))
