"""A callback that reads what a run's second optimizer step takes, at most: by torch's allocator, and from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from measure import forget_peak


class Meter(pl.Callback):
    """Writes ``OUTPUT.RANK.json`` after the second optimizer step.

    Args:
        output: where to; the rank is put behind it.

    What torch allocates is counted by its profiler, from the start of training on; weights and the reference's weights
    are there before, and are added. The process's resident memory is read beside it, the profiler's own records in it.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.found: dict[str, Any] = {}
        self._profile: Any = None
        self._mark: torch.Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Nothing of a model is loaded yet."""
        self.found["process"] = resident("VmRSS")
        self.found["files_before"] = resident("RssFile")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """What is there before the first step."""
        models = [pl_module.policy, getattr(pl_module.reference, "_model", None)]
        self.found["kept"] = sum(held(model) for model in models if model is not None)
        cpu = torch.profiler.ProfilerActivity.CPU
        self._profile = torch.profiler.profile(activities=[cpu], profile_memory=True)
        self._profile.start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """From the second step on the optimizer's state is there."""
        if trainer.global_step == 1 and self._mark is None:
            self.found |= {"tokens": int(batch[0].input_ids.numel()), "passes": len(batch)}
            self._mark = torch.empty(MARK)  # its allocation can be found again
            forget_peak()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the second step."""
        if trainer.global_step < 2 or "resident" in self.found:
            return
        self.found["resident"] = resident("VmHWM")
        self.found["files"] = resident("RssFile")
        self._profile.stop()
        self.found["traced"] = self.found["kept"] + most_allocated(self._profile) - 4 * MARK
        Path(f"{self.output}.{trainer.global_rank}.json").write_text(json.dumps(self.found))


MARK = 1_234_567
"""Floats of a tensor whose allocation marks the start of the second step among the profiler's records."""


def most_allocated(profile: Any) -> int:
    """Bytes alive at once, at most, from the mark on, of those that were allocated within the profile."""
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    marked = False
    for _, change in changes:
        now += change
        marked = marked or change == 4 * MARK
        most = max(most, now) if marked else 0
    assert marked, "the mark was not found"
    return most


def held(model: torch.nn.Module) -> int:
    """Bytes of weights and buffers on this rank, each once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def resident(which: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
