"""The study's runs: which there are, which come next, and the processes that do them.

A finished run is a line of results.jsonl, so the same command continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.arms import ARMS, FRESH, LONG, Trial
from benchmarks.study.settings import TEMPERATURES, Size
from tqdm.auto import tqdm

FIFTH = 0.2
LONGER = {"double": 2, "long": 4}
"""Stages with more steps, and how many times as many."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        stage: ``base``, ``tune``, ``main``, ``double`` and ``long`` (two and four times the steps), ``beta`` (a fifth
            of the chosen β).
        arm: the arm; "base" of the base.
        trial: number of its setting.
        seed: the world's, the base's and the training order's.
    """

    stage: str
    arm: str
    trial: int
    seed: int

    @property
    def key(self) -> str:
        """What its line is found by."""
        return f"{self.stage} {self.arm} {self.trial} {self.seed}"


Lines = dict[str, dict[str, Any]]


def key_of(line: dict[str, Any]) -> str:
    """The key of a line of results."""
    return Job(line["stage"], line["arm"], line["trial"], line["seed"]).key


class Plan:
    """What there is to do.

    Args:
        size: of the study.
        lines: results that are there, by key.
    """

    def __init__(self, size: Size, lines: Lines) -> None:
        self.size, self.lines = size, lines

    def trials(self, arm: str) -> list[Job]:
        """The tuning runs of an arm."""
        return [Job("tune", arm, i, seed) for i in range(self.size.trials) for seed in self.size.tuning]

    def chosen(self, arm: str) -> tuple[int, float] | None:
        """Setting and temperature with the best mean score at the best goal in tuning; None before all are there."""
        jobs = self.trials(arm)
        if not all(job.key in self.lines for job in jobs):
            return None
        scores: dict[tuple[int, float], float] = {}
        for job in jobs:
            for temperature in TEMPERATURES:
                found = statistics.fmean(self.lines[job.key]["best"][f"{temperature:g}"])
                place = job.trial, temperature
                scores[place] = scores.get(place, 0.0) + found
        return max(scores, key=lambda place: scores[place])

    def jobs(self) -> Iterator[Job]:
        """All that can be named by now, the most telling first."""
        size = self.size
        arms = [arm for arm in ARMS if size.arms is None or arm in size.arms]
        long = [arm for arm in (LONG if size.long_arms is None else size.long_arms) if arm in arms]
        yield from (Job("base", "base", 0, seed) for seed in (*size.tuning, *size.seeds, *size.fresh))
        for group in (long, [arm for arm in arms if arm not in long]):
            for arm in group:
                yield from self.trials(arm)
            for stage in ("main", "long", "beta") if group is long else ("main",):
                for arm in group:
                    if (chosen := self.chosen(arm)) is not None:
                        yield from (Job(stage, arm, chosen[0], seed) for seed in size.seeds)
        for seed, stage, arm in itertools.product(size.fresh, ("main", *LONGER), FRESH):
            if arm in arms and (chosen := self.chosen(arm)) is not None:
                yield Job(stage, arm, chosen[0], seed)

    def open(self) -> list[Job]:
        """The jobs that have no line."""
        return [job for job in self.jobs() if job.key not in self.lines]


def setting(size: Size, arm: str, number: int) -> Trial:
    """The one that an arm's trial has."""
    trial = ARMS[arm].trials[number]
    return Trial(trial.lr * size.rates, trial.beta)


def do(job: Job, root: Path, size: Size) -> dict[str, Any]:
    """Do one job: its line of results."""
    from benchmarks.study import laboratory, run

    lab = laboratory.make(root, job.seed, size)
    start = time.process_time()
    found: dict[str, Any]
    if job.stage == "base":
        found = run.base_figures(lab, size, job.seed)
    else:
        trial = setting(size, job.arm, job.trial)
        if job.stage == "beta":
            trial = Trial(trial.lr, trial.beta * FIFTH)
        steps = size.steps * LONGER.get(job.stage, 1)
        found = run.run(lab, job.arm, trial, steps, size, job.seed, tune=job.stage == "tune")
        found["setting"] = asdict(trial)
    return {**asdict(job), "cpu_s": round(time.process_time() - start, 1), **found}


def work(plan: Plan, results: Path, root: Path, workers: int, until: str | None) -> int:
    """Do all open jobs; the number of those that failed."""
    root.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    running: dict[Future[dict[str, Any]], Job] = {}
    bar = tqdm(initial=len(plan.lines), desc="study", unit="run")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet, initargs=(str(root),))
    try:
        while True:
            busy = {job.key for job in running.values()}
            making = {job.seed for job in running.values() if job.stage == "base"}  # a base's job makes the world
            for job in plan.open():
                if len(running) >= workers or (until and time.strftime("%H:%M") >= until):
                    break
                if job.key in busy | failed or job.seed in making:
                    continue
                running[pool.submit(do, job, root, plan.size)] = job
                busy.add(job.key)
                making |= {job.seed} if job.stage == "base" else set()
            if not running:
                return len(failed)
            bar.set_postfix_str(" | ".join(sorted(busy)))
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                try:
                    line = done.result()
                except Exception as error:
                    failed.add(job.key)
                    tqdm.write(f"failed: {job.key}: {error!r}", file=sys.stderr)
                    continue
                plan.lines[job.key] = line
                with results.open("a") as file:
                    file.write(json.dumps(line, separators=(",", ":")) + "\n")
                bar.update()
    except KeyboardInterrupt:
        print(f"\nstopped; {len(plan.lines)} runs are in {results}, the same command continues")
        raise SystemExit(130) from None
    finally:
        bar.close()
        for process in list((pool._processes or {}).values()):
            process.terminate()
        with contextlib.suppress(Exception):
            pool.shutdown(wait=False, cancel_futures=True)


def _quiet(root: str) -> None:
    """In each process: one thread, what is printed goes to a log, and it ends with its parent."""
    log = open(Path(root) / f"worker-{os.getpid()}.log", "a", buffering=1)  # noqa: SIM115 (as long as the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)
