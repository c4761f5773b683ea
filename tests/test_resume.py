"""Resuming is exact wherever a run stops: at any hook, with dropout, from a stream; and the log loses nothing."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from conftest import build, make_trainer
from rap_lightning.losses import BCO, DPO
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.training.schedules import CosineWithWarmup
from test_fit import StopAt, assert_same, checkpoints, logged, weights


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


class StopIn(pl.Callback):
    """Raises at the n-th call of one of Lightning's hooks during training."""

    def __init__(self, hook: str, calls: int) -> None:
        self.left = calls
        setattr(self, hook, self._count)

    def _count(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.left -= 1
            if self.left == 0:
                raise StopAt


def fit(
    run: Path, model: Path, data: Path, *, ckpt: Path | None = None, trainer: dict[str, Any] | None = None, **more: Any
) -> Any:
    options = {"optimizer": adam, "schedule": CosineWithWarmup(), "loss": DPO(0.5), "batch_size": 2} | more
    module, datamodule = build(model, data, **options)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 3} | (trainer or {})
    resume = {} if ckpt is None else {"ckpt_path": str(ckpt), "weights_only": True}
    make_trainer(run, **settings).fit(module, datamodule, **resume)
    return module


def stopped(run: Path, model: Path, data: Path, hook: str, calls: int, **options: Any) -> Path:
    """The checkpoint of a run that an exception in a hook has ended."""
    saver = ModelCheckpoint(run / "saved", save_on_exception=True)
    trainer = options.pop("trainer", {}) | {"enable_checkpointing": True, "callbacks": [saver, StopIn(hook, calls)]}
    with pytest.raises(StopAt):
        fit(run, model, data, trainer=trainer, **options)
    return checkpoints(run / "saved")[-1]


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and weights of the run without an interruption, by what is added to the trainer's options."""

    @cache
    def run(**trainer: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("whole")
        return folder, weights(fit(folder, tiny, pairs_folder, trainer=trainer))

    return run


# 46 relabelled pairs, 2 a batch, 3 batches a step: 23 batches and 8 steps an epoch; validation after batches 9 and 18
@pytest.mark.parametrize(
    ("hook", "calls"),
    [
        pytest.param("on_train_batch_start", 9, marks=pytest.mark.slow),
        ("on_before_optimizer_step", 4),
        pytest.param("on_before_zero_grad", 5, marks=pytest.mark.slow),
        ("on_train_batch_end", 9),  # before a validation that is due
        ("on_train_batch_end", 23),  # the epoch's last batch
        pytest.param("on_validation_start", 1, marks=pytest.mark.slow),
        ("on_validation_batch_end", 3),  # in the middle of one
        pytest.param("on_validation_end", 2, marks=pytest.mark.slow),
        pytest.param("on_train_epoch_end", 1, marks=pytest.mark.slow),
        ("on_train_epoch_start", 2),
    ],
)
def test_a_run_goes_on_exactly_from_any_hook_it_stopped_in(
    hook: str, calls: int, uninterrupted: Any, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    validating = {"val_check_interval": 9, "log_every_n_steps": 5}
    whole, final = uninterrupted(**validating)
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, hook, calls, trainer=validating)
    rest = fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, trainer=validating)
    assert_same(final, weights(rest))
    expected = {(row["step"], "val/loss" in row): row for row in logged(whole)}
    found = [{(row["step"], "val/loss" in row): row for row in logged(tmp_path / run)} for run in ("part", "rest")]
    assert found[0].keys() | found[1].keys() == expected.keys(), "no window and no validation is lost"
    for rows in found:
        for key, row in rows.items():
            for name, value in row.items():
                if "per_second" not in name and name != "epoch":
                    assert value == expected[key][name], (hook, key, name)


@pytest.mark.parametrize("interval", [1.0, pytest.param(23, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("hook", "calls"), [("on_train_batch_end", 23), ("on_validation_batch_end", 2)])
def test_a_validation_at_the_end_of_an_epoch_is_run_when_the_run_goes_on(
    interval: float, hook: str, calls: int, uninterrupted: Any, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    validating = {"val_check_interval": interval}
    whole, final = uninterrupted(**validating)
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, hook, calls, trainer=validating)
    rest = fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, trainer=validating)
    assert_same(final, weights(rest))
    means = [[row["val/loss"] for row in logged(run) if "val/loss" in row] for run in (whole, tmp_path / "rest")]
    assert means[0] == means[1]
    assert len(means[0]) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_random_numbers_go_on_where_they_were(streaming: bool, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """Dropout of an adapter, with batches of an unfinished step thrown away and workers that draw seeds."""
    options = {
        "policy": PolicyConfig(str(tiny), lora=Lora(r=4, dropout=0.3)), "num_workers": 2, "streaming": streaming,
        "trainer": {"max_steps": 11, "max_epochs": -1 if streaming else 2},
    }  # fmt: skip
    whole = fit(tmp_path / "whole", tiny, pairs_folder, **options)
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_train_batch_start", 18, **options)
    torch.rand(7)  # whatever a process has drawn before
    assert_same(weights(whole), weights(fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, **options)))


@pytest.mark.parametrize("state", ["loss", "reference"])
def test_moving_averages_and_a_following_reference_go_on(
    state: str, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    def options() -> dict[str, Any]:
        return {"loss": BCO(0.5)} if state == "loss" else {"reference": Synchronised(every=3, alpha=0.5)}

    whole = fit(tmp_path / "whole", tiny, pairs_folder, **options())
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_train_batch_end", 13, **options())
    assert_same(weights(whole), weights(fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, **options())))


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_there(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from rap_lightning.training.schedules import ConstantWithWarmup

    options = {"schedule": ConstantWithWarmup()}
    whole = fit(tmp_path / "whole", tiny, pairs_folder, trainer={"max_steps": 12}, **options)
    for steps in (5, 8):
        saver = ModelCheckpoint(tmp_path / f"{steps}", save_last=True)
        trainer = {"max_steps": steps, "enable_checkpointing": True, "callbacks": [saver]}
        fit(tmp_path / "short", tiny, pairs_folder, trainer=trainer, **options)
        ckpt = checkpoints(tmp_path / f"{steps}")[-1]
        rest = fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, trainer={"max_steps": 12}, **options)
        assert_same(weights(whole), weights(rest))


def test_a_checkpoint_of_another_loss_is_refused(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    from rap_lightning.errors import ConfigError
    from rap_lightning.losses import Mixture

    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_train_batch_end", 7)
    with pytest.raises(ConfigError, match="a run with another loss"):
        fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, loss=Mixture([DPO(0.5), DPO(0.1)]))
