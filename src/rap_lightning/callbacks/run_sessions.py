"""A run that goes on from a checkpoint is one run in several sessions, each with a folder; checkpoints list them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

SESSIONS = "rap_lightning_sessions"
"""Where a checkpoint keeps the sessions that led to it."""


class Sessions:
    """This session of a run, and those before it.

    A session is ``{folder, started, from_step, step, seconds}``: where its files are, when it was started (by which its
    folder is known again), the steps it was at when it began and when the checkpoint to go on from was written, and the
    wall time between the two. What it did after that checkpoint is in its folder and led to nothing.

    Attributes:
        earlier: the sessions before this one, oldest first.
        checkpoint: what this one went on from; None where it began at step 0.
        from_step: optimizer steps that had been taken then.
    """

    def __init__(self) -> None:
        self.earlier: list[dict[str, Any]] = []
        self.checkpoint: str | None = None
        self.from_step = 0
        self._this: dict[str, Any] | None = None
        self._clock = 0.0

    def begin(self, folder: Path, started: str) -> None:
        """This session is the one that writes to ``folder``; its wall time runs from now."""
        self._this, self._clock = {"folder": str(folder.resolve()), "started": started}, time.monotonic()

    def take_up(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Go on from a checkpoint, a file, folder or URL. Of one that tells of no sessions only the step is known."""
        self.checkpoint = str(path) if "://" in str(path) else os.path.realpath(path)
        self.from_step = int(checkpoint["global_step"])
        unknown = {"folder": None, "started": None, "from_step": 0, "step": self.from_step, "seconds": None}
        self.earlier = list(checkpoint.get(SESSIONS) or [unknown])

    def so_far(self, step: int) -> list[dict[str, Any]]:
        """All sessions up to a checkpoint of ``step``, for the checkpoint."""
        if self._this is None:  # another rank than zero, or a checkpoint outside of fit
            return self.earlier
        seconds = round(time.monotonic() - self._clock, 1)
        return [*self.earlier, {**self._this, "from_step": self.from_step, "step": step, "seconds": seconds}]

    def record(self) -> dict[str, Any] | None:
        """What run.json says of it; None where the run began here."""
        if self.checkpoint is None:
            return None
        return {"checkpoint": self.checkpoint, "step": self.from_step, "sessions": self.earlier}
