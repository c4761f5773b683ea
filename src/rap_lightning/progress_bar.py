"""The progress bar of everything but training steps: tqdm on a terminal, a line every 15 seconds in a log.

The lines of ``fit`` itself are written by callbacks/console_lines.py.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_EVERY = 15.0
"""Seconds between two lines in a log."""


def adapt_to_terminal() -> None:
    """Set the environment variables that other libraries read; called before they are imported.

    With ``NO_COLOR`` rich still writes bold type and cursor movements, which a dumb terminal gets neither of. The bars
    of datasets and transformers would fill a log with carriage returns.
    """
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


class LogLines(tqdm):
    """tqdm that prints each state on its own line."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """A function that prints one state; tqdm's own returns to the beginning of the line."""

        def print_line(text: str) -> None:
            if text:
                print(text, file=file, flush=True)

        return print_line

    def close(self) -> None:
        """Close without the carriage return with which tqdm clears a bar."""
        self.fp = io.StringIO()
        super().close()


def progress(iterable: Any = None, **options: Any) -> Any:
    """tqdm with its options; where standard error is not a terminal, a line every 15 seconds, the first after 15."""
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    options |= {"mininterval": LINE_EVERY, "delay": LINE_EVERY, "leave": False}
    return LogLines(iterable, **{"disable": False} | options)
