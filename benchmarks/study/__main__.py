"""``python -m benchmarks.study``: make the worlds, run every arm, write the tables and pictures of docs/study.

With ``--task reading --model HuggingFaceTB/SmolLM2-135M-Instruct`` the same on a real model and its own responses.

The same command continues where it was stopped. What is there is not run again: to repeat it, name another --output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.study.arms import ARMS
from benchmarks.study.judges import TASKS
from benchmarks.study.schedule import Lines, Plan, key_of, work
from benchmarks.study.settings import FULL, REAL, SHORT


def main() -> int:
    """Parse the command line, run what is open, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of results, tables, pictures; by default docs/study")
    parser.add_argument("--work", type=Path, help="folder of worlds and responses; by default runs/study")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--task", choices=list(TASKS), help="what a real model is asked and judged for")
    parser.add_argument("--model", help="of a task: an instruct model's folder or Hub id")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="run these alone; by default all")
    parser.add_argument("--short", action="store_true", help="a study of the same shape in a minute")
    parser.add_argument("--until", type=time_of_day, metavar="HH:MM", help="start no run after this time of day")
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and pictures of what is there")
    options = parser.parse_args()
    if options.task and options.short:
        parser.error("--short is of the worlds; a task has no short study")
    if options.report and (given := [n for n in ("model", "arms", "until") if getattr(options, n)]):
        parser.error(f"--{given[0]} has no effect with --report, which runs nothing")
    if not options.report and (options.task is None) != (options.model is None):
        parser.error("--task and --model go together")
    size = SHORT if options.short else FULL
    if options.task:
        size = replace(REAL, task=options.task, model=options.model)
    folder = options.work or Path("runs/study-short" if options.short else "runs/study")
    output = options.output or (folder if options.short else Path("docs/study"))
    output.mkdir(parents=True, exist_ok=True)
    results = output / f"{options.task or 'results'}.jsonl"
    lines = read(results)
    if not options.report:
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")
        if options.task:
            from benchmarks.study.laboratory import prepare

            prepare(folder.resolve(), options.task, options.model)
        run = replace(size, arms=options.arms or size.arms)
        failed = work(Plan(run, lines), results, folder.resolve(), options.workers, options.until)
        if failed:
            print(f"{failed} runs failed; what they printed is in {folder}/worker-*.log", file=sys.stderr)
            return 1
    from benchmarks.study.report import write

    write(output, lines, size)
    return 0


def time_of_day(text: str) -> str:
    """A time of day in the form that it is compared in; argparse refuses others."""
    return time.strftime("%H:%M", time.strptime(text, "%H:%M"))


def read(results: Path) -> Lines:
    """The lines of results by key; a last line that a kill cut off is taken away."""
    if not results.is_file():
        return {}
    whole, _, rest = results.read_text().rpartition("\n")
    if rest:
        results.write_text(whole + "\n" if whole else "")
    return {key_of(line): line for line in map(json.loads, whole.splitlines())}


if __name__ == "__main__":
    sys.exit(main())
