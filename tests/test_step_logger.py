"""Logging in its own turn: before any callback that stops the run, and told to those that listen."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from conftest import build, make_trainer, sgd
from rap_lightning.training.step_logger import LoggedStep, LogObserver, StepLogger
from test_fit import StopAt, logged


class Listener(LogObserver):
    def __init__(self) -> None:
        self.heard: list[LoggedStep] = []

    def on_step_logged(self, trainer: pl.Trainer, logged: LoggedStep) -> None:
        self.heard.append(logged)


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise StopAt


def test_observers_hear_each_logged_step_before_a_callback_can_stop_the_run(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    listener = Listener()
    module, data = build(tiny, pairs_folder, optimizer=sgd)
    trainer = make_trainer(tmp_path, max_steps=6, log_every_n_steps=2, callbacks=[Stop(), listener])
    with pytest.raises(StopAt):
        trainer.fit(module, data)
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert [one.step for one in listener.heard] == [row["step"] for row in rows] == [1, 2, 4]
    assert [one.values["loss"] for one in listener.heard] == [row["loss"] for row in rows]
    assert module.step_logger.last == listener.heard[-1]


def test_a_trainer_has_the_logger_once_and_first(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module, data = build(tiny, pairs_folder, optimizer=sgd)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Listener()])
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    assert isinstance(trainer.callbacks[0], StepLogger)
    assert sum(isinstance(one, StepLogger) for one in trainer.callbacks) == 1
