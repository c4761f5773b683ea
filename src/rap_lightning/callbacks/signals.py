"""Ctrl-C, SIGTERM and SLURM's preemption signal: never in the middle of an optimizer step, on all ranks at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.batches.types import copies_at_once
from rap_lightning.losses.base import over_ranks


class Stopped(SystemExit):
    """Raised where a signal ends the run; the exit code is 128 plus its number, as a shell expects."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class WholeSteps(pl.Callback):
    """Defers signals while weights are being updated, so that the checkpoint they lead to is of a whole step.

    A single process is interrupted at once everywhere else (forward and backward pass, data, validation). Several
    processes agree once per optimizer step, before it is taken, and once per validation batch, and stop together after
    it; a second Ctrl-C or SIGTERM stops one alone. SIGTERM saves, prints how to resume, and exits with 143. Under SLURM
    the requeue signal (SIGUSR1, or that of Lightning's SLURMEnvironment) saves and requeues the job at the end of a
    batch, or with several processes of a step, through Lightning's own handler, which by itself would run wherever the
    signal arrives.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._pending: list[int] = []
        self._agreed: list[int] = []  # of several processes: those that at least one of them has received
        self._held = self._many = self._saving = False
        self._requeue: int | None = None
        self._owner = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, once: the sanity check comes first, where there is one."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._pending, self._held, self._saving = [], False, False
        self._many, self._owner = trainer.world_size > 1, os.getpid()
        # private: a strategy of a single process has no cluster_environment (Lightning 2.6)
        environment = trainer._accelerator_connector.cluster_environment
        self._requeue = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)
        if self._many:
            # At each batch Lightning 2.6 broadcasts whether its own SIGTERM handler, which is replaced here, has run on
            # rank 0, and waits for the device to read it; there is no option for it.
            trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = lambda: None
        for signum in (signal.SIGINT, signal.SIGTERM, *([self._requeue] if self._requeue else [])):
            self._previous[signum] = signal.signal(signum, self._on_signal)

    on_sanity_check_start = on_train_start

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """From here on, only record signals.

        Several processes agree here, where the guard has waited for the device anyway: after the step they would wait
        for the optimizer too, and the device would have nothing to do until the next forward pass is queued.
        """
        self._held = True
        self._agree(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Obey recorded signals: the optimizer step, if there was one, is done and counted."""
        self._held = False
        self._obey_together()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._agree(trainer)
            self._obey_together()

    def on_exception(self, *_: Any) -> None:
        """Record signals from now on: a checkpoint may be saved, which a signal must not interrupt."""
        self._held, self._saving = False, True

    def teardown(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        previous, self._previous = self._previous, {}
        for signum, handler in previous.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a data worker, which inherited this handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        again = signum in self._pending
        self._pending.append(signum)
        if self._saving or self._held or signum == self._requeue or (self._many and not again):
            return
        self._obey()

    def _agree(self, trainer: pl.Trainer) -> None:
        """Find out which signals any rank has received, in one reduction; every rank must call it."""
        if self._many and self._previous:
            device = trainer.strategy.root_device
            received = torch.tensor([signum in self._pending for signum in self._previous], dtype=torch.float32)
            ranks = over_ranks(received.to(device, non_blocking=copies_at_once(device))).tolist()
            self._agreed = [signum for signum, count in zip(self._previous, ranks, strict=True) if count]

    def _obey_together(self) -> None:
        agreed, self._agreed = self._agreed if self._many else self._pending, []
        if self._requeue is not None and self._requeue in agreed:
            agreed = [signum for signum in agreed if signum != self._requeue]
            self._pending = [signum for signum in self._pending if signum != self._requeue]
            handler: Callable[[int, FrameType | None], Any] = self._previous[self._requeue]
            handler(self._requeue, None)
        if agreed:
            self._pending = agreed
            self._obey(on_all_ranks=True)

    def _obey(self, *, on_all_ranks: bool = False) -> None:
        signum, self._pending = self._pending[0], []
        stop = KeyboardInterrupt() if signum == signal.SIGINT else Stopped(signum)
        stop.on_all_ranks = on_all_ranks  # type: ignore[union-attr]
        if signum != signal.SIGINT:
            rank_zero_info(f"{signal.Signals(signum).name}: saving a checkpoint and stopping")
        raise stop
