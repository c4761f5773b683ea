"""``rap-lightning report``: one page that compares runs."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from rap_lightning.cli.help_format import PlainParser
from rap_lightning.errors import ConfigError
from rap_lightning.models.atomic_folder import all_or_nothing, refuse_non_empty

DESCRIPTION = """One self-contained HTML page, with PNGs beside it, that compares runs of fit.

Example: rap-lightning report ra=runs/version_0 dpo=runs/version_1 --output my-report
         open my-report/index.html

It shows what the run folders hold: training curves by half of the pairs, samples, data, differing config keys, time and
memory; and, of runs that were evaluated (rap-lightning evaluate), how scores follow goals, what was unlearned, and
more. What isn't there yet is named, with the command that makes it. The page works offline, in light and dark, on a
phone and on paper; the same folders give the same bytes."""


def run(args: list[str]) -> int:
    """Parse, read, draw and write."""
    own = own_parser().parse_args(args)
    from rap_lightning.reporting.figures import require_matplotlib

    require_matplotlib()
    output = Path(own.output)
    if not own.overwrite:
        _refuse(output)
    elif not _is_report(output):
        refuse_non_empty(output)
    from rap_lightning.reporting.headline import headline
    from rap_lightning.reporting.page import PAGE, write
    from rap_lightning.reporting.read_runs import read_runs

    runs = read_runs(own.runs)
    old = _set_aside(output) if own.overwrite and _is_report(output) else None
    try:
        with all_or_nothing(output) as folder:
            files = write(runs, folder)
    except BaseException:
        if old is not None and not output.exists():
            old.rename(output)
        raise
    if old is not None:
        shutil.rmtree(old)
    for one in runs:
        for note in one.notes:
            print(f"{one.name}: {note}", file=sys.stderr)
    print(headline(runs).outcome)
    print(f"wrote {output / PAGE}, and {len(files) - 1} pictures beside it")
    return 0


def own_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = PlainParser("report", DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="folder of a run, as in runs/version_0, or of an evaluation; NAME=FOLDER names it on the page",
    )  # fmt: skip
    parser.add_argument("--output", default="report", help="folder to write; it must not exist, or be empty (report)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report at --output, and only that")
    return parser


def _is_report(folder: Path) -> bool:
    """Whether a folder is a report of ours: its page says so, and there is nothing beside it but pictures."""
    from rap_lightning.reporting.page import MADE_BY, PAGE

    try:
        with (folder / PAGE).open(encoding="utf-8", errors="replace") as page:
            ours = MADE_BY in page.read(2000)
        return ours and all(path.name == PAGE or path.suffix == ".png" for path in folder.iterdir())
    except OSError:
        return False


def _refuse(output: Path) -> None:
    if _is_report(output):
        raise ConfigError(f"{output} holds an earlier report. Add --overwrite to replace it, or name another --output.")
    refuse_non_empty(output)


def _set_aside(output: Path) -> Path:
    """The earlier report under another name, until the new one is there."""
    aside = output.with_name(f".{output.name}.old")
    if aside.exists():
        shutil.rmtree(aside)
    return output.rename(aside)
