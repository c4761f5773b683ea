"""``rap-lightning report``: one page that compares runs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rap_lightning.atomic_write import atomic_folder, refuse_non_empty
from rap_lightning.cli.help_format import PlainParser
from rap_lightning.errors import ConfigError

DESCRIPTION = """Write one self-contained HTML page that compares runs of fit, with a PNG of each picture next to it.

Example: rap-lightning report ra=runs/version_0 dpo=runs/version_1 --output my-report
         open my-report/index.html

The page shows what the run folders hold: training curves by origin, samples, data, config differences, time and memory;
and, for evaluated runs (rap-lightning evaluate), scores by goal, differences with intervals, unlearning and more. What
is missing is listed with the command that writes it. The page works offline, in light and dark, on a phone and on
paper; the same folders give the same bytes."""


def run(args: list[str]) -> int:
    """Parse the arguments, read the runs and write the page."""
    own = own_parser().parse_args(args)
    from rap_lightning.reporting.charts import require_matplotlib

    require_matplotlib()
    from rap_lightning.reporting.page import PAGE, write
    from rap_lightning.reporting.read_runs import read_runs
    from rap_lightning.reporting.tables import headline

    output = Path(own.output)
    replaced = _is_report(output)
    if replaced and not own.overwrite:
        raise ConfigError(
            f"{output} holds an earlier report. Add --overwrite to replace it, or choose another --output."
        )
    if not replaced:
        refuse_non_empty(output)
    runs = read_runs(own.runs)
    # An earlier report is replaced once the new one is complete.
    with atomic_folder(output.with_name(f".{output.name}.new") if replaced else output) as folder:
        files = write(runs, folder)
    if replaced:
        shutil.rmtree(output)
        output.with_name(f".{output.name}.new").rename(output)
    head, rows = headline(runs)
    for row in rows:
        print(f"{row[0]}: {head[3]} {row[3]}")
    print(f"wrote {output / PAGE} and {len(files) - 1} pictures")
    return 0


def own_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = PlainParser("report", DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="directory of a run (runs/version_0) or of an evaluation; NAME=FOLDER sets its name on the page",
    )  # fmt: skip
    parser.add_argument("--output", default="report", help="folder to write; must not exist, or be empty (report)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report at --output")
    return parser


def _is_report(folder: Path) -> bool:
    """Whether a folder holds a report and nothing else: an index.html that this command wrote, and pictures."""
    from rap_lightning.reporting.page import MADE_BY, PAGE

    try:
        with (folder / PAGE).open(encoding="utf-8", errors="replace") as page:
            ours = MADE_BY in page.read(2000)
        return ours and all(path.name == PAGE or path.suffix == ".png" for path in folder.iterdir())
    except OSError:
        return False
