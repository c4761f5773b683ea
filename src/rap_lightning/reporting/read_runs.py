"""Run folders, complete or not: what fit and evaluate wrote there.

Read in this order: ``read_runs`` checks and names the folders, ``_read_run`` reads the files of one, and ``Run`` holds
them. A file that is missing is left empty; a file that can't be read is left out with a note.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.reporting.curves import Curves, joined, read_curves
from rap_lightning.reporting.earlier_sessions import Session, earlier_sessions
from rap_lightning.reporting.evaluation_file import Evaluation, SampledText, mean_scores, read_evaluation, sampled
from rap_lightning.reporting.text import as_number, clean, counted

MARKS = ("metrics.csv", "run.json", "evaluation/evaluation.json", "evaluation.json")
"""A folder with one of these is a run directory."""


class Probe(NamedTuple):
    """A line of likelihood.jsonl: how far the log-prob of one kind of response has changed since the start, in nats."""

    step: int
    condition: str
    role: str
    low: float
    high: float
    change: float


@dataclass
class Run:
    """The files of a run.

    Attributes:
        folder: as given on the command line.
        name: what the page calls the run.
        index: its place on the command line, which determines its colour and marker.
        config, record, goal: config.yaml, run.json, goal.json.
        sessions: the earlier sessions of a resumed run; their metrics, samples and likelihoods are joined below.
        data: data_report.json, a dict per split and source.
        curves: metrics.csv; None without the file.
        evaluation: evaluation.json; None without the file.
        samples: the samples of the last step in samples.jsonl, which the GoalSamples callback writes.
        steering: step -> goal -> mean score, from samples.jsonl.
        likelihood: likelihood.jsonl.
        notes: what is missing or unusual.
    """

    folder: Path
    name: str
    index: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    goal: dict[str, Any] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    curves: Curves | None = None
    evaluation: Evaluation | None = None
    samples: list[SampledText] = field(default_factory=list)
    steering: dict[int, dict[float, float]] = field(default_factory=dict)
    likelihood: list[Probe] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says about method and data."""
        return as_dict(self.record.get("facts"))

    @property
    def base(self) -> str | None:
        """The model that training began with."""
        name = as_dict(self.facts.get("base_model")).get("name")
        return None if name is None else str(name)

    @property
    def relabel(self) -> str | None:
        """The relabelling mode."""
        mode = as_dict(self.facts.get("data")).get("relabel")
        return mode if isinstance(mode, str) else None

    @property
    def step(self) -> int | None:
        """Optimizer steps taken, as far as is known."""
        known = [as_number(self.facts.get("step")), self.curves.last_step if self.curves is not None else None]
        return max((int(value) for value in known if value), default=None)

    @property
    def stopped(self) -> tuple[int, str] | None:
        """The step at which the run was interrupted, and by what; None for other runs."""
        stop = as_dict(self.record.get("stopped"))
        step = as_number(stop.get("step"))
        return None if step is None or self.record.get("finished") else (int(step), clean(stop.get("by"), 60))

    @property
    def seconds(self) -> float | None:
        """Wall time of the last session."""
        end = self.record.get("finished") or as_dict(self.record.get("stopped")).get("at")
        try:
            ends = [datetime.strptime(str(one), "%Y-%m-%dT%H:%M:%S%z") for one in (self.record.get("started"), end)]
        except ValueError:
            return None
        return (ends[1] - ends[0]).total_seconds()

    @property
    def wall_time(self) -> tuple[str, float] | None:
        """Wall time in seconds, and how many sessions it covers, in words (empty for a run of one session)."""
        known = [one for one in (*(session.seconds for session in self.sessions), self.seconds) if one is not None]
        if not known:
            return None
        among = len(self.sessions) + 1
        covered = f"{len(known)} of {among} sessions" if len(known) < among else f"{among} sessions"
        return covered if among > 1 else "", sum(known)

    @property
    def scale(self) -> tuple[float, float] | None:
        """Lowest and highest reward, from the evaluation or else from the goal template."""
        if self.evaluation is not None and self.evaluation.scale is not None:
            return self.evaluation.scale
        return Evaluation(self.goal).scale

    def files(self, name: str) -> Iterator[tuple[Path, int | None]]:
        """Yield the path of a file in each session, oldest first, and the step up to which it counts (None: all)."""
        folders = [(one.folder, one.end) for one in self.sessions if one.folder is not None]
        for folder, end in [*folders, (self.folder, None)]:
            if (folder / name).is_file():
                yield folder / name, end


def as_dict(value: Any) -> dict[str, Any]:
    """Return the value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_runs(given: list[str]) -> list[Run]:
    """Read the folders of a command line, ``FOLDER`` or ``NAME=FOLDER``.

    Raises:
        ConfigError: a folder or a name is given twice.
        DataError: a folder doesn't exist or is not a run directory.
    """
    named = [_split_name(one) for one in given]
    seen: set[Path] = set()
    for folder, _ in named:
        _refuse_other_folder(folder)
        if folder.resolve() in seen:
            raise ConfigError(f"{folder} is given twice. Name each run once.")
        seen.add(folder.resolve())
    names = _names(named)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two runs are called {twice[0]}. Give each its own name, as NAME=FOLDER.")
    runs = []
    for index, ((folder, _), name) in enumerate(zip(named, names, strict=True)):
        try:
            runs.append(_read_run(folder, name, index))
        except OSError as error:
            raise DataError(f"{folder} can't be read: {error.strerror} ({error.filename})") from error
    return runs


def _split_name(given: str) -> tuple[Path, str | None]:
    """Split NAME=FOLDER. Both parts may contain equals signs, so the split is where a folder exists."""
    if "=" not in given or Path(given).exists():
        return Path(given), None
    places = [place for place, letter in enumerate(given) if letter == "="]
    place = next((place for place in places if given[place + 1 :] and Path(given[place + 1 :]).exists()), places[0])
    name, folder = given[:place].strip(), given[place + 1 :]
    if not name or not folder:
        raise ConfigError(f"expected FOLDER or NAME=FOLDER, found {given!r}")
    return Path(folder), name


def _names(named: list[tuple[Path, str | None]]) -> list[str]:
    """Return the given name of each run, or else the shortest end of its path that no other run shares."""
    parts = [folder.resolve().parts for folder, _ in named]
    names = []
    for i, (_, name) in enumerate(named):
        others = [other for j, other in enumerate(parts) if j != i and named[j][1] is None]
        ends = range(1, len(parts[i]) + 1)
        depth = next((k for k in ends if all(other[-k:] != parts[i][-k:] for other in others)), 1)
        names.append(clean(name or "/".join(parts[i][-depth:]), 80))
    return names


def _refuse_other_folder(folder: Path) -> None:
    if any((folder / mark).is_file() for mark in MARKS):
        return
    if not folder.exists():
        raise DataError(f"{folder} doesn't exist. Give the directory of a run, such as runs/version_0.")
    above = next((up for up in folder.parents[:2] if any((up / mark).is_file() for mark in MARKS)), None)
    below = sorted(path.parent for path in folder.glob("*/metrics.csv"))
    hint = f" Did you mean {above}?" if above else f" Runs in it: {', '.join(map(str, below[:5]))}." if below else ""
    raise DataError(f"{folder} is not a run directory: it has none of {', '.join(MARKS)}.{hint}")


def _read_run(folder: Path, name: str, index: int) -> Run:
    run = Run(folder, name, index)
    run.config = as_dict(_load(run, "config.yaml"))
    run.record = as_dict(_load(run, "run.json"))
    run.goal = as_dict(_load(run, "goal.json"))
    data = _load(run, "data_report.json")
    run.data = [part for part in data if isinstance(part, dict)] if isinstance(data, list) else []
    run.sessions = earlier_sessions(folder, run.record)
    if found := [(read_curves(path), end) for path, end in run.files("metrics.csv")]:
        last = found.pop()[0] if found[-1][1] is None else Curves()
        run.curves = joined([(curves, end) for curves, end in found if end is not None], last)
    # In an evaluation's own folder, samples.jsonl is evaluate's; in a run's folder, it is the GoalSamples callback's.
    within, own = folder / "evaluation" / "evaluation.json", folder / "evaluation.json"
    if (path := within if within.is_file() else own).is_file():
        run.evaluation = read_evaluation(path)
        run.evaluation.scores = mean_scores(_json_lines(run, path.with_name("samples.jsonl"), texts=["prompt_id"]))
    if path == within or not own.is_file():
        _read_samples(run)
    for path, end in run.files("likelihood.jsonl"):
        for line in _json_lines(run, path, numbers=["step", "low", "high", "change_nats"]):
            if end is None or line["step"] <= end:
                run.likelihood.append(
                    Probe(int(line["step"]), str(line.get("condition")), str(line.get("role")), line["low"],
                          line["high"], line["change_nats"])
                )  # fmt: skip
    run.notes += _notes(run)
    return run


def _read_samples(run: Run) -> None:
    last = -1
    for path, end in run.files("samples.jsonl"):
        scores: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for line in _json_lines(run, path, numbers=["step"]):
            step, one = int(line["step"]), sampled(line)
            if end is not None and step > end:
                continue
            if one.goal is not None and one.score is not None:
                scores[step][one.goal].append(one.score)
            if step > last:
                last, run.samples = step, []
            if step == last:
                run.samples.append(one)
        for step, by_goal in sorted(scores.items()):
            run.steering[step] = {goal: sum(found) / len(found) for goal, found in sorted(by_goal.items())}


def _notes(run: Run) -> Iterator[str]:
    if run.stopped is not None:
        yield f"was interrupted at step {run.stopped[0]:,} by {run.stopped[1]}"
    elif run.record and run.record.get("finished") is None:
        yield f"has not finished (still running, or killed); the last known step is {run.step or 0:,}"
    for session in run.sessions:
        if session.lost:
            yield f"steps {session.first + 1:,} to {session.end:,} are not shown: {clean(session.lost, 300)}"
    if run.curves is not None:
        if run.curves.broken:
            yield f"{counted(run.curves.broken, 'line')} of metrics.csv can't be read (cut off?)"
        for metric in ("loss", "val/loss"):
            if metric in run.curves.not_finite:
                yield f"{metric} is nan or infinite from step {run.curves.not_finite[metric]:,}; not shown there"
        if not run.curves.values:
            yield "metrics.csv has no values yet"
    if run.evaluation is not None:
        yield from run.evaluation.notes


def _load(run: Run, name: str) -> Any:
    path = run.folder / name
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        run.notes.append(f"{name} can't be read; it is left out")
        return None


def _json_lines(
    run: Run, path: Path, numbers: list[str] | None = None, texts: list[str] | None = None
) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file that have these keys; other lines are counted in a note."""
    found, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            one = as_dict(json.loads(line))
        except (ValueError, RecursionError):
            one = {}
        whole = all(as_number(one.get(key)) is not None for key in numbers or [])
        whole = whole and all(isinstance(one.get(key), str) for key in texts or [])
        if one and whole:
            found.append(one | {key: float(one[key]) for key in numbers or []})
        elif line.strip():
            bad += 1
    if bad:
        name = path.relative_to(run.folder) if path.is_relative_to(run.folder) else path
        run.notes.append(f"{counted(bad, 'line')} of {name} can't be read (cut off?)")
    return found
