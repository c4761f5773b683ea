"""Several processes on one task: which part is this one's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from rap_lightning.errors import ConfigError

# SLURM_NTASKS is set in a batch script too, where one process would take its first part for all there is
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def own_part(shard: str | None) -> tuple[int, int, int]:
    """(this process, how many, its rank on this machine), as asked or as the launcher says.

    Args:
        shard: "0/4" is the first of four.

    Raises:
        ConfigError: it reads otherwise.
    """
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not int(match[1]) < int(match[2]):
            raise ConfigError(
                f"--shard: expected this process's number of how many, from 0/4 to 3/4 say; found {shard}"
            )
        return int(match[1]), int(match[2]), int(os.environ.get("LOCAL_RANK", match[1]))
    for rank, world, local in LAUNCHERS:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, os.environ[rank]))
    return 0, 1, 0


def in_processes(count: int, args: Sequence[str]) -> int:
    """Run ``rap-lightning`` with ``args`` in several processes, each with its part; the highest of their exit codes.

    The others go on where one fails: what they finish is kept.
    """
    children = []
    for rank in range(count):
        own = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "rap_lightning.cli.main", *args]
        children.append(subprocess.Popen(command, env=os.environ | own))
    try:
        codes = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
        raise
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        print(f"{len(failed)} of {count} processes did not finish; the same command goes on with what they left")
    return max(abs(code) for code in codes)
