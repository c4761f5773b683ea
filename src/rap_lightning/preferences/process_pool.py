"""Map a function over items in several processes, with results in order."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from rap_lightning.errors import ConfigError

In = TypeVar("In")
Out = TypeVar("Out")


def map_in_order(work: Callable[[In], Out], items: Iterable[In], num_proc: int | None) -> Iterator[Out]:
    """Yield ``work`` of each item, in order; at most two items per process wait, so memory does not grow."""
    if num_proc is not None and num_proc < 1:
        raise ConfigError(f"num_proc must be at least 1, found {num_proc}")
    if num_proc is None or num_proc == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Out]] = deque()
    with ProcessPoolExecutor(num_proc, initializer=_ignore_ctrl_c) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also if the caller stops early: leaving the pool would wait for what is not cancelled
            for future in waiting:
                future.cancel()


def _ignore_ctrl_c() -> None:
    """Let the parent process alone react to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
