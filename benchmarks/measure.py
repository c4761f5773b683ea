"""What both sides are measured by: seconds and CPU seconds of a step, and the process's peak memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would make CPU time meaningless


def options(description: str | None) -> argparse.ArgumentParser:
    """What both sides take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="what rows.py wrote")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--skip", type=int, default=0, help="rows to leave out at the beginning")
    parser.add_argument("--pairs-per-step", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser


def read_rows(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that this run trains on, in order."""
    lines = Path(a.rows).read_text(encoding="utf-8").splitlines()[a.skip :][: a.pairs_per_step * a.steps]
    assert len(lines) == a.pairs_per_step * a.steps, "not enough rows"
    return [json.loads(line) for line in lines]


class Clock:
    """Seconds and CPU seconds of each step; on a GPU, until it has done what was queued."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self) -> None:
        wait_for(self.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        wait_for(self.device)
        self.wall.append(round(time.perf_counter() - self._wall, 4))
        self.cpu.append(round(time.process_time() - self._cpu, 3))


def wait_for(device: str) -> None:
    """Wait until a GPU has done what was queued."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def forget_peak(device: str = "cpu") -> None:
    """Begin the peak memory anew: what loading took is not of interest."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: str = "cpu") -> float:
    """The most memory that tensors on the GPU, or the process on a CPU, have taken since, in GB."""
    if device == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) / 1e9, 2)
