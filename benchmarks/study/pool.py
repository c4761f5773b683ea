"""The processes that do the jobs: which is started when, and what becomes of its line."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.study.jobs import Job, Plan, run
from benchmarks.study.settings import Size
from tqdm.auto import tqdm


def work(plan: Plan, results: Path, root: Path, size: Size, workers: int, until: str | None) -> int:
    """Run all jobs; the number of those that failed."""
    root.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    running: dict[Future[dict[str, Any]], Job] = {}
    bar = tqdm(
        total=max(plan.total(), len(plan.lines)), initial=len(plan.lines), desc="study", unit="run", smoothing=0.1
    )
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=quiet, initargs=(str(root),))
    try:
        while True:
            busy = {job.key for job in running.values()}
            # two processes must not make one world
            worlds = {(job.knobs, job.seed) for job in running.values() if job.stage == "knob"}
            for job in plan.open():
                if len(running) >= workers or (until and time.strftime("%H:%M") >= until):
                    break
                if job.key in busy | failed or (job.stage == "knob" and (job.knobs, job.seed) in worlds):
                    continue
                running[pool.submit(run, job, plan.context(job), root, size)] = job
                busy.add(job.key)
                worlds |= {(job.knobs, job.seed)} if job.stage == "knob" else set()
            if not running:
                return len(failed)
            bar.set_postfix_str(" | ".join(sorted(job.key for job in running.values())), refresh=True)
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
        for process in list((pool._processes or {}).values()):
            process.terminate()
        print(f"\nstopped; {len(plan.lines)} runs stand in {results}, the same command goes on")
        raise SystemExit(130) from None
    finally:
        bar.close()
        with contextlib.suppress(Exception):
            pool.shutdown(wait=False, cancel_futures=True)


def quiet(root: str) -> None:
    """In each process of the pool: one thread, and what is printed goes to a log."""
    log = open(Path(root) / f"worker-{os.getpid()}.log", "a", buffering=1)  # noqa: SIM115 (as long as the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")


def end_with(parent: int) -> None:
    """End this process soon after its parent: one that was killed leaves nobody to tell it that no work will come."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)
