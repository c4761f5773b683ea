"""``python -m benchmarks.study``: make the worlds, run every arm, write the tables and pictures of docs/study.

Each finished run is a line of results.jsonl: the same command goes on where it was stopped, and only what was under way
is lost. What is there already is not run again: to repeat all of it, name another --output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.study.jobs import Plan, key_of
from benchmarks.study.pool import work
from benchmarks.study.settings import FULL, SHORT


def main() -> int:
    """Parse the command line, run what is open, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of results, tables, pictures; by default docs/study")
    parser.add_argument("--work", type=Path, help="folder of worlds and weights; by default runs/study")
    parser.add_argument("--workers", type=positive, default=2, help="processes, one thread each")
    parser.add_argument(
        "--short", action="store_true", help="a study of the same shape in a minute, in runs/study-short"
    )
    parser.add_argument("--until", type=time_of_day, metavar="HH:MM", help="start no run after this time of day")
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and pictures of what is there")
    options = parser.parse_args()
    size = SHORT if options.short else FULL
    options.work = options.work or Path("runs/study-short" if options.short else "runs/study")
    options.output = options.output or (options.work if options.short else Path("docs/study"))
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    lines = read(results)
    if not options.report:
        os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")
        left = work(Plan(size, lines), results, options.work.resolve(), size, options.workers, options.until)
        if left:
            print(f"{left} runs failed; what they said stands in {options.work}/worker-*.log")
            return 1
    from benchmarks.study.report import write

    write(options.output, lines, size)
    return 0


def positive(text: str) -> int:
    """A number of processes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r}")
    return int(text)


def time_of_day(text: str) -> str:
    """HH:MM."""
    try:
        return datetime.strptime(text, "%H:%M").strftime("%H:%M")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a time of day such as 13:40, found {text!r}") from error


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The lines of results by key; a last line that was cut off by a kill is left out and taken away."""
    if not results.is_file():
        return {}
    text = results.read_text()
    whole, _, rest = text.rpartition("\n")
    if rest:
        results.write_text(whole + "\n" if whole else "")
    return {key_of(line): line for line in map(json.loads, whole.splitlines())}


if __name__ == "__main__":
    sys.exit(main())
