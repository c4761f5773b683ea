"""How far a long run is: requests, tokens per second, time to go."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 15.0  # seconds, where no terminal shows a bar


class Progress:
    """A bar in a terminal, a line now and then elsewhere. Used as a context manager.

    Args:
        what: is being done.
        total: requests; ``done`` of them are from an earlier run.
        shown: whether anything is printed.
    """

    def __init__(self, what: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.before = what, total, done
        self.done, self.tokens = done, 0
        self.started = self._said = time.monotonic()
        terminal = shown and sys.stderr.isatty()
        self._lines = shown and not terminal
        self._bar = tqdm(total=total, initial=done, desc=what, unit="", disable=not terminal, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, token_counts: Sequence[int]) -> None:
        """Count finished requests by their tokens."""
        self.done += len(token_counts)
        self.tokens += sum(token_counts)
        self._bar.set_postfix_str(f"{self.rate:,.0f} tokens/s" if self.tokens else "", refresh=False)
        self._bar.update(len(token_counts))
        if self._lines and time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            print(self.line(), flush=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Tokens per second of this run."""
        return self.tokens / max(self.seconds, 1e-9)

    def line(self) -> str:
        """Where the run stands."""
        fresh = self.done - self.before
        eta = self.seconds / fresh * (self.total - self.done) if fresh else 0.0
        speed = f", {self.rate:,.0f} tokens/s" if self.tokens else ""
        return f"{self.what}: {self.done:,} of {self.total:,}{speed}, {tqdm.format_interval(eta)} to go"
