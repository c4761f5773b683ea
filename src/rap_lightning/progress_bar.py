"""Progress for people: a bar where a terminal shows it, a line now and then elsewhere, and no colours where asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_EVERY = 15.0
"""Seconds from line to line, where no terminal shows a bar."""


def adapt_to_terminal() -> None:
    """Set what other libraries go by; called before they are imported.

    ``NO_COLOR`` takes the colours out of rich, but not bold type or the moving of the cursor; a terminal that is
    dumb gets neither. Bars that others draw (datasets, transformers) would fill a log with carriage returns.
    """
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


class Lines(tqdm):
    """tqdm's figures, in lines."""

    disable: bool

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What prints one state; tqdm's own returns to the beginning of the line."""

        def say(text: str) -> None:
            if text:
                print(text, file=file, flush=True)

        return say

    def close(self) -> None:
        """Without the carriage return with which tqdm takes a bar away."""
        if not self.disable:
            self.disable = True
            type(self)._decr_instances(self)


def progress(iterable: Any = None, **options: Any) -> Any:
    """tqdm with its options; where standard error is no terminal, a line each 15 seconds, and none before."""
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    options |= {"mininterval": LINE_EVERY, "delay": LINE_EVERY, "leave": False}
    return Lines(iterable, **{"disable": False} | options)
