"""Where a run stands, in whole optimizer steps.

Lightning counts batches. A run that ends between two optimizer steps has gradients of some batches in memory, which no
checkpoint holds; so a checkpoint says that the unfinished step never began, and its batches are run again.
"""

from __future__ import annotations

from typing import Any


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


def batches_done(trainer: Any) -> int:
    """Batches of the current epoch that a resumed run must not see again; 0 in any other."""
    if not trainer.training:
        return 0
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
