"""The command line, and ranks, as real processes: for signals, exit codes and collectives.

A process is forked from a server that has imported everything: importing torch and Lightning takes five seconds, which
each process would pay anew.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kills


def _command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is born ignoring Ctrl-C
    os.environ.update(environment)
    os.chdir(environment.get("PWD", "."))
    kills.command(arguments, log)


class CliProcess:
    """A process of the command line.

    Args:
        context: From the fixture ``process_server``.
        arguments: What follows ``rap-lightning``.
        log: The file for its output.
        environment: Added to that of the server; ``PWD`` is its working folder.
    """

    def __init__(self, context: Any, arguments: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        self.process = context.Process(target=_command, args=(list(arguments), str(log), environment))
        self.process.start()

    @property
    def said(self) -> str:
        """All output so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, pattern: str, seconds: float = 300) -> None:
        """Wait until the output has the pattern."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.said, re.MULTILINE):
            assert self.process.is_alive(), self.said[-2000:]
            assert time.monotonic() < end, self.said[-2000:]
            time.sleep(0.02)

    def end(self, seconds: float = 300) -> int:
        """Wait for the end, and return the exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s"
        return int(self.process.exitcode)


def free_port() -> int:
    """Return a port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def fit_on_ranks(context: Any, cases: list[dict[str, Any]], ranks: int, folder: Path, seconds: float = 300) -> None:
    """Fit the cases of ``rank_worker`` one after another in so many processes, and wait for their end."""
    if not cases:
        return
    plan = folder / f"plan-{ranks}-{time.monotonic_ns()}.json"
    plan.write_text(json.dumps(cases))
    cluster = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    logs = [plan.with_suffix(f".{rank}.log") for rank in range(ranks)]
    started = [
        context.Process(target=_rank, args=([str(plan), str(folder)], str(log), cluster | {"LOCAL_RANK": str(rank)}))
        for rank, log in enumerate(logs)
    ]
    try:
        for process in started:
            process.start()
        for process, log in zip(started, logs, strict=True):
            process.join(seconds)
            assert process.exitcode == 0, log.read_text()[-6000:]
    finally:
        for process in started:
            process.kill()


def _rank(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import rank_worker

    sys.argv = ["rank_worker", *arguments]
    try:
        rank_worker.main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


class RankPair:
    """Two ranks of one run, started with the variables that a cluster sets.

    Args:
        start: The fixture ``start_process``.
        arguments: Of both ranks.
        strategy: More arguments of both.
        nodes: 1 or 2; with 2, each rank is the first of its node.
        second: More arguments of rank 1.
        alone: Start this rank only.
        apart: Working folder of each rank; relative paths are then as on hosts without a shared disk.
    """

    def __init__(
        self, start: Callable[..., CliProcess], arguments: list[str], strategy: list[str], nodes: int = 1,
        second: Sequence[str] = (), alone: int | None = None, apart: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        cluster = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        both = [*arguments, "--trainer.devices", str(2 // nodes), "--trainer.num_nodes", str(nodes), *strategy]
        self.ranks = []
        for rank in range(2) if alone is None else [alone]:
            place = (rank, 0) if nodes == 2 else (0, rank)
            cluster |= dict(zip(("NODE_RANK", "LOCAL_RANK"), map(str, place), strict=True))
            cluster |= {"PWD": str(apart[rank])} if apart else {}
            self.ranks.append(start([*both, *(second if rank else ())], **cluster))

    def end(self) -> list[int]:
        """Wait for both, and return their exit codes."""
        return [rank.end() for rank in self.ranks]

    @property
    def said(self) -> str:
        """The output of all ranks so far."""
        return "\n".join(rank.said for rank in self.ranks)
