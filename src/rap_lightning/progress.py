"""Where a run stands, in whole optimizer steps.

Lightning counts batches. A run that ends between two optimizer steps has gradients of some batches in memory, which no
checkpoint holds; so a checkpoint says that the unfinished step never began, and its batches are run again.
"""

from __future__ import annotations

from typing import Any

from rap_lightning.errors import ConfigError


def rewind_to_whole_step(checkpoint: dict[str, Any], accumulate: int, batches: float) -> None:
    """Set the batch counters of a checkpoint back to the last finished optimizer step, in place.

    Args:
        checkpoint: as Lightning made it.
        accumulate: batches per optimizer step.
        batches: batches of this rank in the epoch; the last step of an epoch may have fewer than ``accumulate``.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    done = current["processed"]
    whole = done if done >= batches else done - done % accumulate
    if whole == done == current["ready"]:
        return  # between two steps: Lightning's own counters are right
    for name in ("ready", "started", "processed", "completed"):
        total[name] -= current[name] - whole
        current[name] = whole


def close_epoch(checkpoint: dict[str, Any]) -> None:
    """Say of a checkpoint made at the last batch of a stream that its epoch is over, in place.

    Lightning would resume at the end of that epoch, and go on counting its batches in the next one.

    Args:
        checkpoint: as Lightning made it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batches["is_last_batch"] = False
    for name in ("ready", "started", "processed", "completed"):
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
        close_epoch(checkpoint)
        return
    if old["pairs"] != new["pairs"]:
        raise ConfigError(
            f"the checkpoint was written within an epoch of steps of {old['pairs']} pairs, and this run's have "
            f"{new['pairs']}: their order would not go on where it stopped. Set --data.batch_size and "
            f"--trainer.accumulate_grad_batches so that they and the devices multiply to {old['pairs']}."
        )
    batches = done // old["accumulate"] * new["accumulate"]
    for name in ("ready", "started", "processed", "completed"):
        total[name] += batches - current[name]
        current[name] = batches


def batches_done(trainer: Any) -> int:
    """Batches of the current epoch that a resumed run must not see again; 0 in any other."""
    if not trainer.training:
        return 0
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
