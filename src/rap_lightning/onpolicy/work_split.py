"""Several processes on one task: the share of this process, and starting them on one machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from rap_lightning.errors import ConfigError

# Not SLURM_NTASKS: a batch script has it too, where a single process would take its first share for the whole.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def own_part(shard: str | None) -> tuple[int, int, int]:
    """Return (number of this process, number of processes, rank on this machine), from ``--shard`` or the launcher."""
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if match is None or not int(match[1]) < int(match[2]):
            raise ConfigError(f"--shard: expected NUMBER/COUNT, from 0/4 to 3/4 for four processes; found {shard}")
        return int(match[1]), int(match[2]), int(os.environ.get("LOCAL_RANK", match[1]))
    for rank, world, local in LAUNCHERS:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, os.environ[rank]))
    return 0, 1, 0


def run_processes(count: int, args: Sequence[str]) -> int:
    """Run ``rap-lightning`` with ``args`` in several processes, each with its share; return the highest exit code.

    If one fails, the others continue: finished work is kept.
    """
    command = [sys.executable, "-m", "rap_lightning.cli.main", *args]
    children = [
        subprocess.Popen(
            command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        codes = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
        raise
    if failed := sum(code != 0 for code in codes):
        print(f"{failed} of {count} processes failed; the same command resumes with what is finished")
    return max(abs(code) for code in codes)
