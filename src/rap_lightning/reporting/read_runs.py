"""Run folders: what fit and evaluate left there, whole or not."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.reporting.curves import Curves, as_number, joined, read_curves
from rap_lightning.reporting.evaluation import Evaluation, Sample, read_evaluation, sample_of
from rap_lightning.reporting.joined_sessions import Session, earlier_sessions
from rap_lightning.reporting.paired import Scores, mean_scores, scored_of
from rap_lightning.reporting.text import clean, counted

T = TypeVar("T")
MARKS = ("metrics.csv", "run.json", "evaluation/evaluation.json", "evaluation.json")
"""A folder with one of these is a run."""


@dataclass(frozen=True)
class Probe:
    """A line of likelihood.jsonl: how far a kind of response has moved since the start, in nats."""

    step: int
    condition: str
    role: str
    low: float
    high: float
    change: float


@dataclass
class Run:
    """A run as its folder tells it.

    Attributes:
        folder: as it was given; name: how the page calls it; index: its place, which fixes colour and marker.
        config, record, goal: config.yaml, run.json, goal.json; empty where there is none.
        sessions: those before the last one, of a run that went on from a checkpoint. What they logged up to there is
            in ``curves``, ``samples``, ``steering`` and ``likelihood``.
        data: data_report.json, a dict per split and source.
        curves: of metrics.csv, None without one.
        scores: of evaluate's samples, to compare runs prompt by prompt.
        samples: of fit's samples.jsonl, those of the last step; steering: step -> goal -> mean score.
        likelihood: likelihood.jsonl.
        notes: what is odd about the folder.
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
    scores: Scores = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    steering: dict[int, dict[float, float]] = field(default_factory=dict)
    likelihood: list[Probe] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says of method and data."""
        return as_dict(self.record.get("facts"))

    @property
    def step(self) -> int | None:
        """Optimizer steps it took, as far as is known."""
        step = as_number(self.facts.get("step"))
        logged = self.curves.last_step if self.curves is not None else None
        known = [int(value) for value in (step, logged) if value]
        return max(known) if known else None

    @property
    def relabel(self) -> str | None:
        """The relabelling mode."""
        mode = as_dict(self.facts.get("data")).get("relabel")
        return mode if isinstance(mode, str) else None

    @property
    def stopped(self) -> tuple[int, str] | None:
        """The step at which a run was ended, and by what; None of one that finished, and where nobody could say it."""
        told = as_dict(self.record.get("stopped"))
        step = as_number(told.get("step"))
        return None if step is None or self.record.get("finished") else (int(step), clean(told.get("by"), 60))

    @property
    def seconds(self) -> float | None:
        """Wall time from the first step to the last, what callbacks do around them included, of the last session."""
        end = self.record.get("finished") or as_dict(self.record.get("stopped")).get("at")
        try:
            ends = [datetime.strptime(str(one), "%Y-%m-%dT%H:%M:%S%z") for one in (self.record.get("started"), end)]
        except ValueError:
            return None
        return (ends[1] - ends[0]).total_seconds()

    @property
    def wall_time(self) -> tuple[str, float] | None:
        """What is known of its wall time: of which sessions, and their seconds together."""
        known = [one for one in (*(session.seconds for session in self.sessions), self.seconds) if one is not None]
        if not known:
            return None
        among, of = len(self.sessions) + 1, len(known)
        which = "" if among == 1 else f" of {among} sessions" if of == among else f" of {of} of {among} sessions"
        return which, sum(known)

    def files(self, name: str) -> Iterator[tuple[Path, int | None]]:
        """A file of each session that has it, the oldest first, and the step up to which it counts; None: all of it."""
        folders = [(one.folder, one.end) for one in self.sessions if one.folder is not None]
        for folder, end in [*folders, (self.folder, None)]:
            if (folder / name).is_file():
                yield folder / name, end

    @property
    def scale(self) -> tuple[float, float] | None:
        """Lowest and highest reward, by the evaluation or else by the goal template."""
        if self.evaluation is not None and self.evaluation.scale is not None:
            return self.evaluation.scale
        scale = as_dict(self.goal.get("scale"))
        low, high = as_number(scale.get("low")), as_number(scale.get("high"))
        return (low, high) if low is not None and high is not None and low < high else None


def read_runs(given: list[str]) -> list[Run]:
    """Read the folders of a command line, ``FOLDER`` or ``NAME=FOLDER``.

    Raises:
        ConfigError: a folder or a name is given twice.
        DataError: a folder is not there, or holds no run.
    """
    named = [_named(one) for one in given]
    seen: dict[Path, Path] = {}
    for folder, _ in named:
        _refuse_no_run(folder)
        if (there := folder.resolve()) in seen:
            raise ConfigError(f"{folder} is given twice; a run is compared with others. Name each folder once.")
        seen[there] = folder
    names = _names(named)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two runs are called {twice[0]}: give each a name of its own, as NAME=FOLDER.")
    runs = []
    progress = tqdm(
        zip(named, names, strict=True), "reading", len(names), delay=2, file=sys.stderr, leave=False, disable=None
    )
    for index, ((folder, _), name) in enumerate(progress):
        try:
            runs.append(_run(folder, name, index))
        except OSError as error:
            raise DataError(f"{folder} can't be read: {error.strerror} ({error.filename})") from error
    return runs


def _named(given: str) -> tuple[Path, str | None]:
    """Folder and name; names and folders may have equals signs in them, so what is there decides where to cut."""
    if "=" not in given or Path(given).exists():
        return Path(given), None
    cuts = [i for i, letter in enumerate(given) if letter == "="]
    cut = next((i for i in cuts if Path(given[i + 1 :]).exists() and given[i + 1 :]), cuts[0])
    name, folder = given[:cut].strip(), given[cut + 1 :]
    if not name or not folder:
        raise ConfigError(f"expected FOLDER or NAME=FOLDER, found {given!r}")
    return Path(folder), name


def _names(named: list[tuple[Path, str | None]]) -> list[str]:
    """The name that was given, or else the shortest end of the path that no other run shares."""
    parts = [folder.resolve().parts for folder, _ in named]
    names = []
    for i, (folder, name) in enumerate(named):
        others = [other for j, other in enumerate(parts) if j != i and named[j][1] is None]
        ends = range(1, len(parts[i]) + 1)
        depth = next((k for k in ends if all(other[-k:] != parts[i][-k:] for other in others)), 1)
        names.append(clean(name or "/".join(parts[i][-depth:]) or str(folder), 80))
    return names


def _refuse_no_run(folder: Path) -> None:
    if any((folder / mark).is_file() for mark in MARKS):
        return
    if not folder.exists():
        raise DataError(f"{folder} doesn't exist. Give the folder of a run, such as runs/version_0.")
    around = next((up for up in folder.parents[:2] if any((up / mark).is_file() for mark in MARKS)), None)
    within = sorted(p.parent for p in folder.glob("*/metrics.csv")) if folder.is_dir() else []
    hint = f" Do you mean {around}?" if around else f" Runs in it: {', '.join(map(str, within[:5]))}." if within else ""
    raise DataError(
        f"{folder} is no run: expected a folder with one of {', '.join(MARKS)}, as fit and evaluate write them.{hint}"
    )


def _run(folder: Path, name: str, index: int) -> Run:
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
    evaluated = next(
        (p for p in (folder / "evaluation" / "evaluation.json", folder / "evaluation.json") if p.is_file()), None
    )
    if evaluated is not None:
        run.evaluation = read_evaluation(evaluated)
        run.scores = mean_scores(_lines(run, evaluated.with_name("samples.jsonl"), scored_of))
    if evaluated is None or evaluated.parent != folder:  # beside evaluation.json stand evaluate's samples, not fit's
        _read_samples(run)
    _read_likelihood(run)
    _note(run)
    return run


def _note(run: Run) -> None:
    if run.stopped is not None:
        run.notes.append(f"was stopped at step {run.stopped[0]:,}, by {run.stopped[1]}")
    elif run.record and run.record.get("finished") is None:
        run.notes.append(f"has not ended: it is still running, or was killed; the last step known is {run.step or 0:,}")
    for session in run.sessions:
        if session.lost:
            steps = f"steps {session.first + 1:,} to {session.end:,} are not shown"
            run.notes.append(f"{steps}: {clean(session.lost, 300)}")
    if run.curves is not None:
        if run.curves.broken:
            run.notes.append(
                f"{counted(run.curves.broken, 'line')} of metrics.csv left out: not to be read, cut off perhaps"
            )
        for metric in ("loss", "val/loss"):
            if metric in run.curves.not_finite:
                step = run.curves.not_finite[metric]
                run.notes.append(f"{metric} is not a number, or infinite, from step {step:,}; such values are left out")
        if not run.curves.values:
            run.notes.append("metrics.csv has no figures yet")
    if run.evaluation is not None:
        run.notes.extend(run.evaluation.faults)


def _load(run: Run, name: str) -> Any:
    path = run.folder / name
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".json":
            return json.loads(text)
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        run.notes.append(f"{name} can't be read; left out")
        return None


def _lines(run: Run, path: Path, read: Callable[[dict[str, Any]], T | None]) -> Iterator[T]:
    """What ``read`` makes of the objects of a json-lines file; lines that are none, or say too little, are noted."""
    bad = 0
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            made = read(found) if isinstance(found, dict) else None
            if made is not None:
                yield made
            elif line.strip():
                bad += 1
    if bad:
        name = path.relative_to(run.folder) if path.is_relative_to(run.folder) else path
        run.notes.append(f"{counted(bad, 'line')} of {name} left out: not to be read, cut off perhaps")


def _read_samples(run: Run) -> None:
    def step_and_sample(line: dict[str, Any]) -> tuple[int, Sample] | None:
        step = as_number(line.get("step"))
        return None if step is None else (int(step), sample_of(line))

    last = -1
    for path, end in run.files("samples.jsonl"):
        scores: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for step, sample in _lines(run, path, step_and_sample):
            if end is not None and step > end:
                continue
            if sample.goal is not None and sample.score is not None:
                scores[step][sample.goal].append(sample.score)
            if step > last:
                last, run.samples = step, []
            if step == last:
                run.samples.append(sample)
        run.steering |= {
            step: {goal: sum(found) / len(found) for goal, found in sorted(by.items())} for step, by in scores.items()
        }
    run.steering = dict(sorted(run.steering.items()))


def _read_likelihood(run: Run) -> None:
    def probe(line: dict[str, Any]) -> Probe | None:
        numbers = [as_number(line.get(key)) for key in ("step", "low", "high", "change_nats")]
        if None in numbers:
            return None
        step, low, high, change = (float(value) for value in numbers if value is not None)
        return Probe(int(step), str(line.get("condition")), str(line.get("role")), low, high, change)

    for path, end in run.files("likelihood.jsonl"):
        run.likelihood += [one for one in _lines(run, path, probe) if end is None or one.step <= end]


def as_dict(value: Any) -> dict[str, Any]:
    """The value where it is a dict, an empty one otherwise."""
    return value if isinstance(value, dict) else {}
