"""The warm-up: the same as two runs, margin 0 after it, resumed bit for bit within it and after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from conftest import build, call, make_trainer
from rap_lightning.errors import ConfigError
from rap_lightning.losses import BCO, DPO, SFT, Mixture, SimPO
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.post_warmup import Warmed
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.module import PreferenceModule
from rap_lightning.training.schedules import CosineWithWarmup
from rap_lightning.training.warm_up import WarmUp
from test_fit import Interrupt, StopAt, assert_same, checkpoints, fit, logged, weights

PAIRS = 46  # of pairs_folder's training split, relabelled


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


@pytest.mark.parametrize("lr", [None, 0.2])
def test_a_warm_up_is_a_run_of_sft_and_then_a_run_of_the_loss(
    lr: float | None, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    # a step is an epoch of all pairs, so that two runs see what one sees
    options = {"batch_size": PAIRS, "schedule": CosineWithWarmup(), "optimizer": momentum}
    whole = fit(
        tmp_path / "whole", tiny, pairs_folder, loss=DPO(0.5), warm_up=WarmUp(3, lr), trainer={"max_epochs": 7},
        **options,
    )  # fmt: skip
    first = fit(
        tmp_path / "first", tiny, pairs_folder, loss=SFT(), trainer={"max_epochs": 3},
        **(options | {"optimizer": lambda params: torch.optim.SGD(params, lr=lr or 0.05, momentum=0.9)}),
    )  # fmt: skip
    folder = tmp_path / "warmed"
    first.policy.causal_lm.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)
    second = fit(tmp_path / "second", folder, pairs_folder, loss=DPO(0.5), trainer={"max_epochs": 4}, **options)
    assert_same(weights(whole), weights(second), 1e-5)
    start = dict(PolicyConfig(str(tiny)).build(torch.float32).named_parameters())
    moved = [(p - start[n]).abs().max() for n, p in weights(first).items()]
    assert max(moved) > 1e-3, "or nothing would have been warmed"
    rows = [row for row in logged(tmp_path / "whole") if "loss" in row]
    expected = [r for run in ("first", "second") for r in logged(tmp_path / run) if "loss" in r]
    assert len(rows) == len(expected) == 7
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "lr", "rewards/margins", "logps/chosen/rejected-goal", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (row["step"], name)


@pytest.mark.parametrize("lora", [False, True])
def test_margins_begin_at_zero_after_the_warm_up(lora: bool, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    # logged every 4 steps, and where the warm-up ends: no mean is of both losses
    fit(
        tmp_path, tiny, pairs_folder, lora=lora, warm_up=WarmUp(3), optimizer=adam,
        trainer={"max_steps": 5, "log_every_n_steps": 4},
    )  # fmt: skip
    rows = {row["step"]: row for row in logged(tmp_path) if "loss" in row}
    assert list(rows) == [1, 3, 4, 5]
    assert rows[3]["loss"] == pytest.approx(-rows[3]["rewards/chosen"], rel=1e-6), "the mean of SFT alone"
    assert rows[4]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert rows[4]["rewards/margins"] == rows[4]["rewards/chosen"] == 0
    assert rows[4]["rewards/accuracies"] == 0.5
    assert rows[5]["rewards/chosen"] != 0


# 46 relabelled pairs, 2 a batch, 3 batches a step: 23 batches and 8 steps an epoch; warmed up after step 5 (batch 15)
@pytest.mark.parametrize(
    ("stop", "where", "lora"),
    [
        (7, "after", False),  # within
        (15, "before", False),  # at the switch
        (15, "after", True),
        (20, "before", True),  # after it
        (30, "after", False),
    ],
)
def test_a_run_stopped_within_or_after_the_warm_up_goes_on_bit_for_bit(
    stop: int, where: str, lora: bool, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    # Mixture: its terms are not there during the warm-up; BCO: its running mean begins after it
    loss = lambda: Mixture([BCO(0.1), SFT()])  # noqa: E731
    options = {
        "lora": lora, "optimizer": adam, "schedule": CosineWithWarmup(), "batch_size": 2, "warm_up": WarmUp(5, 2e-2)
    }  # fmt: skip
    trainer = {"max_epochs": 2, "accumulate_grad_batches": 3}
    whole = fit(tmp_path / "whole", tiny, pairs_folder, trainer=trainer, loss=loss(), **options)
    saver = ModelCheckpoint(tmp_path / "saved", save_last="link", save_on_exception=True)
    stopping = {"enable_checkpointing": True, "callbacks": [saver, Interrupt(stop, where)]}
    with pytest.raises(StopAt):
        fit(tmp_path / "part", tiny, pairs_folder, trainer=trainer | stopping, loss=loss(), **options)
    saved = checkpoints(tmp_path / "saved")[-1]
    content = torch.load(saved, weights_only=True)
    held = content["rap_lightning"]["reference"]
    assert bool(held) is (content["global_step"] >= 5)
    if lora:
        assert all(".lora_" in name for name in held), "of an adapter, the adapter alone"
    module, data = build(tiny, pairs_folder, loss=loss(), **options)
    make_trainer(tmp_path / "rest", **trainer).fit(module, data, ckpt_path=str(saved), weights_only=True)
    assert_same(weights(whole), weights(module))
    losses = [{r["step"]: r["loss"] for r in logged(tmp_path / run) if "loss" in r} for run in ("whole", "rest")]
    assert len(losses[1]) >= 6
    assert losses[1] == {step: losses[0][step] for step in losses[1]}


def test_validation_of_a_checkpoint_knows_which_loss_it_was_at(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    options = {"warm_up": WarmUp(3), "optimizer": adam, "loss": DPO(0.5)}
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(
        tmp_path / "run", tiny, pairs_folder, **options,
        trainer={"max_steps": 5, "val_check_interval": 1, "enable_checkpointing": True, "callbacks": [saver]},
    )  # fmt: skip
    during = {row["step"]: row["val/loss"] for row in logged(tmp_path / "run") if "val/loss" in row}
    assert during[3] == pytest.approx(0.6931472, abs=1e-6), "the reference is what the policy is"
    for step in (2, 5):
        module, data = build(tiny, pairs_folder, **options)
        make_trainer(tmp_path / str(step)).validate(
            module, data, ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"), verbose=False, weights_only=True
        )
        assert logged(tmp_path / str(step))[-1]["val/loss"] == pytest.approx(during[step], rel=1e-6)


def test_what_is_monitored_begins_anew_with_the_loss(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    # SFT's loss is in nats per token: it would stay the best, or never be it, whatever the preference loss does
    best = ModelCheckpoint(tmp_path / "best", monitor="val/rewards/chosen", mode="min", filename="{step}")
    patience = EarlyStopping("val/rewards/chosen", mode="min", patience=1)
    fit(
        tmp_path / "run", tiny, pairs_folder, warm_up=WarmUp(3), optimizer=adam, loss=DPO(0.5),
        trainer={
            "max_steps": 5, "val_check_interval": 1, "enable_checkpointing": True, "callbacks": [best, patience],
        },
    )  # fmt: skip
    values = {r["step"]: r["val/rewards/chosen"] for r in logged(tmp_path / "run") if "val/rewards/chosen" in r}
    assert min(values[1], values[2]) < min(values[step] for step in (3, 4, 5)), "or nothing would be tested"
    assert int(Path(best.best_model_path).stem.partition("=")[2]) >= 3


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (Stored(), "before the first step"),
        (AdaptersOff(), "before the warm-up"),
        (Frozen(), "before the warm-up"),
        (Synchronised(alpha=1.0), "another one"),
    ],
)
def test_references_that_cannot_be_the_warmed_policy_are_refused_with_the_reason(reference: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        PreferenceModule(PolicyConfig("x", lora=Lora(r=4)), DPO(), reference, warm_up=WarmUp(10))


def test_its_reference_comes_with_it_alone() -> None:
    with pytest.raises(ConfigError, match=r"comes with --model\.warm_up\.steps"):
        PreferenceModule(PolicyConfig("x"), DPO(), Warmed(3))


def test_a_loss_without_reference_warms_up_too(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    fit(tmp_path, tiny, pairs_folder, loss=SimPO(), warm_up=WarmUp(2), trainer={"max_steps": 4})
    assert len([row for row in logged(tmp_path) if "loss" in row]) == 4


def test_a_warm_up_that_leaves_no_step_or_does_not_fit_the_checkpoint_is_refused(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="leaves none of the run's 3 optimizer steps"):
        fit(tmp_path / "a", tiny, pairs_folder, warm_up=WarmUp(3), trainer={"max_steps": 3})
    for wrong in ({"steps": 0}, {"steps": 3, "lr": 0.0}, {"steps": 3, "lr": float("nan")}):
        with pytest.raises(ConfigError, match="warm_up"):
            WarmUp(**wrong)
    module, data = build(tiny, pairs_folder, loss=DPO(0.5), warm_up=WarmUp(2))
    trainer = make_trainer(tmp_path / "b", max_steps=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    for other, message in ((WarmUp(4), "had ended a warm-up by then"), (None, "reference that changes")):
        module, data = build(tiny, pairs_folder, loss=DPO(0.5), warm_up=other)
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path / "c", max_steps=6).fit(module, data, ckpt_path=str(tmp_path / "three.ckpt"))


def test_the_command_line_takes_it_and_the_run_says_so(
    tiny: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code = call(
        monkeypatch, "fit", "--model.policy.path", str(tiny), "--model.warm_up.steps", "2",
        "--model.warm_up.lr", "1e-3",
        "--data.source", str(pairs_folder), "--data.rejected_weight", "0.5", "--data.max_length", "160",
        "--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.default_root_dir", str(tmp_path),
    )  # fmt: skip
    shown = caplog.text
    assert code == 0
    assert "after 2 steps of SFT; reference: Warmed" in shown
    assert "the warm-up of 2 steps is over: DPO begins" in shown
    assert "first batch after the warm-up: policy and reference differ by at most 0.0e+00 nats" in shown
    (folder,) = tmp_path.glob("version_*")
    card = (folder / "hf" / "README.md").read_text()
    assert "the rejected-goal half weighs 0.5" in card
    assert "WarmUp(steps=2, lr=0.001)" in card
    assert json.loads((folder / "goal.json").read_text())["best"]
