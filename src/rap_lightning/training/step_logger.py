"""StepLogger: the callback that logs a run.

Read it in the order of one step: the module adds each forward pass (``add``), Lightning announces the optimizer step
(``on_before_optimizer_step``), the module marks its end (``mark_step``) or leaves it out (``skip_step``), and where the
step is due the window's means are logged (``on_train_batch_end``) and handed to the observers (``on_step_logged``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from rap_lightning.batches.types import Batch, PairLogps
from rap_lightning.errors import ConfigError
from rap_lightning.losses.base import over_ranks
from rap_lightning.training.guarded_loggers import guard_loggers
from rap_lightning.training.metrics import PairMetrics
from rap_lightning.training.run_state import ends_step

Split = Literal["fit", "val", "test"]
BAR_METRICS = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
"""The metrics on the progress bar, with the names that a console line gives them."""


class LoggedStep(NamedTuple):
    """The means that were logged at an optimizer step."""

    step: int
    values: dict[str, float]


class LogObserver(pl.Callback):
    """A callback that is told what StepLogger logs."""

    def on_step_logged(self, trainer: pl.Trainer, logged: LoggedStep) -> None:
        """Called on every rank, right after a step was logged, wherever the observer is in the list of callbacks."""


class LoggedModule(Protocol):
    """What StepLogger asks of the module."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the weights have taken."""
        ...

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping."""
        ...


class StepLogger(pl.Callback):
    """Logs means over the pairs of all ranks: at steps 1, N, 2N, ... over the steps since the last log, and per epoch.

    Attached by PreferenceModule, so that a plain Trainer logs too. It moves itself to the front of the callbacks: a
    callback that stops the run or saves a checkpoint at the end of a batch then finds the step logged.

    Args:
        terms: names of the loss's own terms.
        warm_up_steps: a step that always ends a window, so that no mean mixes SFT and the loss.
    """

    def __init__(self, terms: Iterable[str] = (), warm_up_steps: int | None = None) -> None:
        names = tuple(terms)
        self.metrics: dict[Split, PairMetrics] = {split: PairMetrics(names) for split in ("fit", "val", "test")}
        self.last = LoggedStep(0, {})
        self._warm_up_steps = warm_up_steps
        self._began = self._paused = 0.0  # of the window, and of the current pause
        self._lr = math.nan
        self._grad_norm: Tensor | None = None  # where the step was due and not skipped
        # A run may be saved between two optimizer steps, with batches of an unfinished one in the sums. The resumed run
        # repeats those batches, so the checkpoint gets the state as of the last whole step.
        self._whole_step: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Move to the front of the callbacks (a new list: Lightning is iterating over the old one); guard loggers."""
        trainer.callbacks = [self, *(one for one in trainer.callbacks if one is not self)]  # type: ignore[attr-defined]
        guard_loggers(trainer.loggers)
        self._whole_step, self._loaded = {}, None

    # -- one optimizer step ---------------------------------------------------------------------------------------

    def add(
        self, split: Split, losses: Tensor, rewards: tuple[Tensor, Tensor], policy: PairLogps, batch: Batch,
        terms: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Add a forward pass to the window, or to the epoch's means; the arguments are those of PairMetrics.update."""
        self.metrics[split].update(losses, rewards, policy, batch, terms)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the step's learning rate (the scheduler steps before the log) and, where due, the unclipped norm."""
        self._lr = optimizer.param_groups[0]["lr"]
        if self._due(trainer, trainer.global_step + 1):
            self._grad_norm = cast(LoggedModule, pl_module).gradient_norm()

    def skip_step(self) -> None:
        """Take the forward passes of this step out of the window again."""
        self.metrics["fit"].resume(self._whole_step["window"])
        self._grad_norm = None

    def mark_step(self) -> None:
        """Remember the state as of a whole step, for checkpoints and for ``skip_step``."""
        self._whole_step = {
            "window": self.metrics["fit"].state_dict(),
            "seconds": time.perf_counter() - self._began,
            "grad_norm": self._grad_norm,
            "lr": self._lr,
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the window where the batch ended a step that is due."""
        if ends_step(trainer, batch_idx) and self._due(trainer, trainer.global_step):
            self._log_window(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self.last.step:
            self._log_window(trainer, pl_module, at_end=True)

    def _due(self, trainer: pl.Trainer, step: int) -> bool:
        return step in (1, self._warm_up_steps) or step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _log_window(self, trainer: pl.Trainer, module: pl.LightningModule, *, at_end: bool = False) -> None:
        metrics = self.metrics["fit"]
        totals = metrics.totals()
        norm = totals.new_full((), math.nan) if self._grad_norm is None else self._grad_norm.to(totals)
        *_, grad_norm = numbers = torch.cat((totals, norm[None])).cpu()  # one copy for all that is logged
        values = metrics.means(numbers[:-1])
        metrics.reset()
        if not values:  # all of its steps were skipped
            return
        seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
        pairs, tokens = values.pop("pairs"), values.pop("tokens")
        values |= {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds, "lr": self._lr}
        if not at_end:  # the norm was taken at a step that was due, and the last one was not
            values["grad_norm"] = float(grad_norm)
        self.last = LoggedStep(trainer.global_step, values)
        self._log(trainer, module, values, on_bar=not at_end)  # Lightning's own log is closed at the end of fit
        self.mark_step()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LogObserver):
                callback.on_step_logged(trainer, self.last)

    # -- validation and test --------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_epoch(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_epoch(trainer, pl_module, "test")

    def _log_epoch(self, trainer: pl.Trainer, module: pl.LightningModule, split: Split) -> None:
        values = self.metrics[split].compute()
        self.metrics[split].reset()
        values.pop("tokens", None)
        if not trainer.sanity_checking:
            self._log(trainer, module, values, prefix=f"{split}/")

    def _log(
        self, trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, float], prefix: str = "",
        *, on_bar: bool = True,
    ) -> None:  # fmt: skip
        named = {prefix + name: value for name, value in values.items()}
        if on_bar:
            # Lightning copies numbers to the device one by one, and a progress bar reads each of them back at every
            # step. Tensors on the host stay there.
            on_host = {name: torch.tensor(value, device="cpu") for name, value in named.items()}
            bar = {prefix + name for name in BAR_METRICS}
            module.log_dict({n: v for n, v in on_host.items() if n in bar}, prog_bar=True, logger=False)
            module.log_dict({n: v for n, v in on_host.items() if n not in bar}, logger=False)
        for logger in trainer.loggers:  # not through log_dict, which would number these by batches, one too low
            logger.log_metrics(named, step=cast(LoggedModule, module).steps_done)
            logger.save()

    # -- training time: the clock behind pairs_per_second ---------------------------------------------------------

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the training time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - begin

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter()

    def end_validation(self) -> None:
        """Start the clock again; called by the module, after the callbacks (one may save a checkpoint)."""
        self._began += time.perf_counter() - self._paused

    # -- exact resume ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; continue the window of the run that is resumed.

        Raises:
            ConfigError: that run had a loss with other terms.
        """
        window = self.metrics["fit"]
        window.to(pl_module.device)
        self._began = time.perf_counter()
        if (loaded := self._loaded) is not None:
            # the checkpoint holds the sums over all ranks: rank 0 continues them, the others begin at 0
            sums = loaded["window"]
            if trainer.global_rank > 0:
                sums = {name: torch.zeros_like(value) for name, value in sums.items()}
            try:
                window.resume(sums)
            except ValueError as error:
                raise ConfigError(
                    f"the checkpoint is from a run with another loss: {error}. Resume with the loss of that run."
                ) from error
            self._began -= loaded["seconds"]
            self._grad_norm, self._lr = torch.tensor(loaded["grad_norm"], device="cpu"), loaded["lr"]
        self._loaded = None
        self.mark_step()

    def state_dict(self) -> dict[str, Any]:
        """Return the window as of the last whole step, its sums over all ranks; every rank must call it."""
        if not (state := dict(self._whole_step)):
            return {}
        state["window"] = {name: over_ranks(value) for name, value in state["window"].items()}
        norm = state["grad_norm"]
        return state | {"grad_norm": math.nan if norm is None else float(norm)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: validation before that must not change it."""
        self._loaded = state_dict
