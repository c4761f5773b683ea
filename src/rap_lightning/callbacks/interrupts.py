"""Ctrl-C never falls into an optimizer step."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning.pytorch as pl


class WholeSteps(pl.Callback):
    """Holds SIGINT back while weights are being updated, so that the checkpoint it leads to is of a whole step.

    Everything else (forward and backward passes, data, validation) is interrupted at once.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._held = False
        self._pressed = False

    def on_before_optimizer_step(self, *_: Any) -> None:
        """From here on, remember Ctrl-C instead of obeying it."""
        if not self._held and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._remember)
            self._held = True

    def on_train_batch_end(self, *_: Any) -> None:
        """The step is done and counted: obey."""
        if self._held:
            signal.signal(signal.SIGINT, self._previous)
            self._held = False
            if self._pressed:
                self._pressed = False
                raise KeyboardInterrupt

    def on_exception(self, *_: Any) -> None:
        """The step failed: Ctrl-C must work while the checkpoint is saved."""
        if self._held:
            signal.signal(signal.SIGINT, self._previous)
            self._held = self._pressed = False

    def _remember(self, *_: Any) -> None:
        self._pressed = True
