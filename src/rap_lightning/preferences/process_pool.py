"""Work shared by processes, results in order."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from rap_lightning.errors import ConfigError

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(work: Callable[[In], Out], items: Iterable[In], num_proc: int | None) -> Iterator[Out]:
    """``work`` of each item, in the items' order; at most a few items a process are held at a time.

    Raises:
        ConfigError: ``num_proc`` below 1.
    """
    if num_proc is not None and num_proc < 1:
        raise ConfigError(f"num_proc must be at least 1, found {num_proc}")
    if num_proc is None or num_proc == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Out]] = deque()
    with ProcessPoolExecutor(num_proc, initializer=_leave_ctrl_c_to_the_parent) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also when the results are no longer wanted
            for future in waiting:
                future.cancel()


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
