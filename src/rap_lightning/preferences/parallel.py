"""Work shared by processes, results in order."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(work: Callable[[In], Out], items: Iterable[In], num_proc: int | None) -> Iterator[Out]:
    """``work`` of each item, in the items' order; at most a few items a process are held at a time.

    An exception while making an item, or in the work, ends the iteration as it would with one process.
    """
    if not num_proc or num_proc == 1:
        yield from map(work, items)
        return
    room = threading.Semaphore(4 * num_proc)  # Pool.imap alone would read all items before the first result is taken
    failed: list[BaseException] = []

    def held() -> Iterator[In]:
        try:
            for item in items:
                room.acquire()
                yield item
        except BaseException as error:  # Pool would wrap what is raised in its thread
            failed.append(error)

    with multiprocessing.Pool(num_proc) as pool:
        for result in pool.imap(work, held()):
            room.release()
            yield result
    if failed:
        raise failed[0]
