"""The sessions of a run that was resumed, each with a folder of its own; checkpoints list them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

SESSIONS = "rap_lightning_sessions"
"""Where a checkpoint keeps the sessions that led to it."""


class Sessions:
    """This session of a run, and the ones before it.

    A session is ``{folder, started, from_step, step, seconds}``: where its files are, when it was started (by which its
    folder is recognised), the optimizer steps at its beginning and at the checkpoint that the next session resumed
    from, and the wall time between the two. What it did after that checkpoint is in its folder, but not part of the
    run.

    Attributes:
        earlier: the sessions before this one, oldest first.
        checkpoint: what this one resumed from; None where it began at step 0.
        from_step: optimizer steps at that checkpoint.
    """

    def __init__(self) -> None:
        self.earlier: list[dict[str, Any]] = []
        self.checkpoint: str | None = None
        self.from_step = 0
        self._this: dict[str, Any] | None = None
        self._clock = 0.0

    def begin(self, folder: Path, started: str) -> None:
        """Record that this session writes to ``folder``, and start its clock."""
        self._this, self._clock = {"folder": str(folder.resolve()), "started": started}, time.monotonic()

    def resume(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Record what this session resumes from, a file, folder or URL; without sessions in it, its step alone."""
        self.checkpoint = str(path) if "://" in str(path) else os.path.realpath(path)
        self.from_step = int(checkpoint["global_step"])
        unknown = {"folder": None, "started": None, "from_step": 0, "step": self.from_step, "seconds": None}
        self.earlier = list(checkpoint.get(SESSIONS) or [unknown])

    def so_far(self, step: int) -> list[dict[str, Any]]:
        """Return all sessions up to a checkpoint at ``step``, for the checkpoint."""
        if self._this is None:  # another rank than zero, or a checkpoint outside of fit
            return self.earlier
        seconds = round(time.monotonic() - self._clock, 1)
        return [*self.earlier, {**self._this, "from_step": self.from_step, "step": step, "seconds": seconds}]

    def record(self) -> dict[str, Any] | None:
        """Return the entry of run.json; None where the run began here."""
        if self.checkpoint is None:
            return None
        return {"checkpoint": self.checkpoint, "step": self.from_step, "sessions": self.earlier}
