"""Where a run stands, in whole optimizer steps.

Lightning counts batches. A run that ends between two optimizer steps has gradients of some batches in memory, which no
checkpoint holds; so a checkpoint says that the unfinished step never began, and its batches are run again. What else a
run carries from step to step (random numbers, sums for the log) is kept as of the last whole step too.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from rap_lightning.errors import ConfigError

COUNTERS = ("ready", "started", "processed", "completed")


def settle(
    checkpoint: dict[str, Any], accumulate: int, batches: float, *, stream_over: bool, validates: bool
) -> None:  # fmt: skip
    """Bring the counters of a checkpoint to the last finished optimizer step, in place, whenever it was made.

    Args:
        checkpoint: as Lightning made it.
        accumulate: batches per optimizer step.
        batches: batches of this rank in the epoch; the last step of an epoch may have fewer than ``accumulate``.
        stream_over: whether this is the last batch of a stream, whose length is not known before.
        validates: whether a validation is due at this step and has not been finished; a resumed run begins it anew.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if stream_over:
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
    if epoch_over:  # Lightning ends an epoch where max_steps ends the run; with more steps it goes on
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

    Lightning would resume at the end of it, and of a stream go on counting its batches in the next one.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] = False
    for name in COUNTERS:
        batches["total"][name] = batches["total"]["ready"]
        batches["current"][name] = 0
        for counts in (epochs["total"], epochs["current"]):
            counts[name] = counts["ready"]


def recount(checkpoint: dict[str, Any], old: dict[str, int], new: dict[str, int]) -> None:
    """Count the epoch's batches of a checkpoint anew, in place: other ranks take as many pairs in other batches.

    Args:
        checkpoint: of whole optimizer steps.
        old, new: ``pairs`` in an optimizer step and ``accumulate``, its batches on each rank, of the run that wrote it
            and of the one that goes on.

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
            f"the checkpoint was written within an epoch of steps of {old['pairs']} pairs, and this run's have "
            f"{new['pairs']}: their order would not go on where it stopped. Set --data.batch_size and "
            f"--trainer.accumulate_grad_batches so that they and the devices multiply to {old['pairs']}."
        )
    batches = done // old["accumulate"] * new["accumulate"]
    for name in COUNTERS:
        total[name] += batches - current[name]
        current[name] = batches


def batches_done(trainer: Any) -> int:
    """Batches of the current epoch that a resumed run must not see again; 0 in any other."""
    if not trainer.training:
        return 0
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where this process's random numbers stand, as plain values and tensors."""
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
    """Go on with the random numbers that ``random_state`` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
