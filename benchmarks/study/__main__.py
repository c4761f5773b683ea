"""``python -m benchmarks.study``: make the worlds, run every arm, write the tables and pictures of docs/study.

Each finished run is a line of results.jsonl: the same command goes on where it was stopped, and only what was under way
is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.study.jobs import Plan, key_of
from benchmarks.study.pool import work
from benchmarks.study.settings import FULL, SHORT


def main() -> int:
    """Parse the command line, run what is open, write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/study"), help="folder of results, tables, pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of worlds and weights")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--short", action="store_true", help="a study of the same shape in a minute, for tests")
    parser.add_argument("--until", metavar="HH:MM", help="start no run after this time of day")
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and pictures of what is there")
    options = parser.parse_args()
    size = SHORT if options.short else FULL
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
