"""Exact resume: what a run is at the end of a whole optimizer step, beyond weights, optimizer and scheduler.

Lightning counts batches. A run that ends between two optimizer steps has gradients of some batches in memory, which no
checkpoint holds. So a checkpoint says that the unfinished step never began (``rewind_to_step``), and the resumed run
repeats its batches: with the random numbers as of the last whole step, which RunState keeps.
"""

from __future__ import annotations

import math
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from rap_lightning.distributed.gather import gathered
from rap_lightning.errors import ConfigError
from rap_lightning.training.protocols import data_of

COUNTERS = ("ready", "started", "processed", "completed")


class RunState:
    """Random numbers of all ranks, optimizer steps done, and the progress within the epoch.

    Attributes:
        steps_done: optimizer steps that the weights have taken; also known in validate and test, where the trainer
            counts none.
        restored: a checkpoint was loaded.
        validated: the step of the last finished validation.
    """

    def __init__(self) -> None:
        self.steps_done = 0
        self.restored = False
        self.validated = -1
        self._random: dict[str, Any] | None = None  # of this rank, as of the last whole step
        self._loaded: list[Any] | None = None  # of all ranks, from a checkpoint
        self._step_size: dict[str, int] | None = None

    def begin(self, trainer: pl.Trainer, device: torch.device) -> None:
        """Set this rank's random numbers; to be called when training starts, after the sanity check."""
        if trainer.global_rank > 0:  # weights were initialised alike; dropout must differ
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        if self._loaded is not None:
            if len(self._loaded) == trainer.world_size:
                set_random_state(self._loaded[trainer.global_rank], device)
            else:
                rank_zero_warn(
                    f"the checkpoint is from a run on {len(self._loaded)} devices, and this one has "
                    f"{trainer.world_size}: random numbers (of dropout) start afresh."
                )
        self._loaded = None
        self._step_size = step_size(trainer)
        self.mark_step(device)

    def mark_step(self, device: torch.device) -> None:
        """Keep the random numbers as of a whole step."""
        self._random = random_state(device)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def rewind(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
        """Bring a checkpoint's counters back to the last whole step, in place."""
        batches = trainer.num_training_batches
        rewind_to_step(
            checkpoint, trainer.accumulate_grad_batches, batches,
            stream_ended=not math.isfinite(batches) and trainer.is_last_batch,
            validates=self._validation_due(trainer),
        )  # fmt: skip

    def _validation_due(self, trainer: pl.Trainer) -> bool:
        """Return whether a validation follows the current batch and has not been finished."""
        if self.validated == trainer.global_step or not trainer.enable_validation:
            return False
        every, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
        if interval is None or not math.isfinite(interval):
            return trainer.is_last_batch
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if every is None:
            return bool(progress.total.processed % int(interval) == 0)
        return bool((trainer.current_epoch + 1) % every == 0 and progress.current.processed % int(interval) == 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; every rank must call it."""
        state: dict[str, Any] = {"validated": self.validated, "step": self._step_size}
        return state if self._random is None else state | {"random": gathered(self._random)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of the run that is resumed."""
        self.validated, self._loaded = state["validated"], state.get("random")


def step_size(trainer: pl.Trainer) -> dict[str, int] | None:
    """Return the pairs in an optimizer step, and each rank's batches in it; None for a user's own data."""
    data = data_of(trainer)
    if data is None:
        return None
    accumulate = trainer.accumulate_grad_batches
    return {"pairs": data.batch_size * accumulate * trainer.world_size, "accumulate": accumulate}


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether the optimizer stepped at the end of this batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def batches_done(trainer: pl.Trainer | None) -> int:
    """Return the batches of the current epoch that a resumed run must not see again; 0 in any other epoch."""
    if trainer is None or not trainer.training:
        return 0
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def rewind_to_step(
    checkpoint: dict[str, Any], accumulate: int, batches: float, *, stream_ended: bool, validates: bool
) -> None:
    """Bring the counters of a checkpoint to the last finished optimizer step, in place, whenever it was made.

    Args:
        checkpoint: as Lightning made it.
        accumulate: batches per optimizer step.
        batches: batches of this rank in the epoch; the last step of an epoch may have fewer than ``accumulate``.
        stream_ended: whether this is the last batch of a stream, whose length is not known before.
        validates: whether a validation is due at this step and has not been finished; a resumed run repeats it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if stream_ended:
        _close_epoch(loops)
        return
    if epochs["total"]["started"] < epochs["total"]["ready"]:  # between two epochs: the next has not begun
        for counts in (epochs["total"], epochs["current"]):
            counts["ready"] = counts["started"]
        _close_epoch(loops)
        return
    done = progress["current"]["processed"]
    whole = done if done >= batches else done - done % accumulate
    epoch_over = epochs["total"]["processed"] == epochs["total"]["ready"]
    if whole >= batches and (epoch_over or not validates):
        _close_epoch(loops)
        return
    if epoch_over:  # Lightning closes the epoch where max_steps ends the run; a run with more steps continues it
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    current, total = progress["current"], progress["total"]
    if epoch_over or not whole == done == current["ready"]:
        for name in COUNTERS:
            total[name] -= current[name] - whole
            current[name] = whole
    if validates:  # Lightning starts a validation from its beginning where one batch of it is under way
        validation = loops["epoch_loop.val_loop.batch_progress"]
        for counts in (validation["total"], validation["current"]):
            counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["is_last_batch"] = False


def _close_epoch(loops: dict[str, Any]) -> None:
    """Say that the epoch is over.

    Lightning would otherwise resume at its end, and count a stream's batches on in the next epoch.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] = False
    for name in COUNTERS:
        batches["total"][name] = batches["total"]["ready"]
        batches["current"][name] = 0
        for counts in (epochs["total"], epochs["current"]):
            counts[name] = counts["ready"]


def rescale_progress(checkpoint: dict[str, Any], old: dict[str, int], new: dict[str, int]) -> None:
    """Convert the epoch's batch count of a checkpoint, in place, to ranks that take as many pairs in other batches.

    Args:
        checkpoint: rewound to a whole optimizer step.
        old, new: ``step_size`` of the run that wrote it and of the one that resumes it.

    Raises:
        ConfigError: steps of another size don't begin where this one stopped.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    done = current["ready"]
    if old == new or not done:
        return
    if progress["is_last_batch"]:  # an epoch's last step has fewer batches, of a number of its own
        _close_epoch(checkpoint["loops"]["fit_loop"])
        return
    if old["pairs"] != new["pairs"]:
        raise ConfigError(
            f"the checkpoint was written within an epoch of steps of {old['pairs']} pairs, and this run has steps of "
            f"{new['pairs']}, so it can't resume in the middle of that epoch. Set --data.batch_size and "
            f"--trainer.accumulate_grad_batches so that they and the devices multiply to {old['pairs']}."
        )
    batches = done // old["accumulate"] * new["accumulate"]
    for name in COUNTERS:
        total[name] += batches - current[name]
        current[name] = batches


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's random number generators, as plain values and tensors."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the random number generators to what ``random_state`` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
