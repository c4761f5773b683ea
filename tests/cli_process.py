"""The command line as a real process, for signals, exit codes and ranks.

A process is forked from a server that has imported everything: importing torch and Lightning takes five seconds, which
each process would pay anew.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
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
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        cluster = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
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
