"""The DeepSpeed overlay: what it says, what Lightning makes of it, what is refused beside it. DeepSpeed never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from rap_lightning.callbacks import Guard
from rap_lightning.cli.trainer_cli import parse_only
from rap_lightning.distributed.deepspeed_checks import check_deepspeed_config, check_deepspeed_trainer
from rap_lightning.errors import ConfigError

OVERLAYS = sorted((ROOT / "configs" / "strategy").glob("deepspeed-*.yaml"))


def options(tiny: Path) -> list[str]:
    return ["--model.policy.path", str(tiny), "--data.source", "nowhere.jsonl"]


def test_there_is_an_overlay_and_it_asks_for_what_works() -> None:
    assert [path.stem for path in OVERLAYS] == ["deepspeed-zero2"]
    config = yaml.safe_load(OVERLAYS[0].read_text(encoding="utf-8"))
    strategy = config["trainer"]["strategy"]
    assert strategy["class_path"] == "DeepSpeedStrategy"
    assert strategy["init_args"]["stage"] == 2
    assert config["trainer"]["accelerator"] == "gpu"
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert config["model"]["reference"] == "Stored"  # a Frozen one would stand whole on every rank
    check_deepspeed_config(config)


def test_the_overlay_stacks_on_a_config(tiny: Path) -> None:
    cli = parse_only([*options(tiny), "-c", str(OVERLAYS[0])])
    trainer = cli.config["trainer"]
    assert trainer["strategy"]["class_path"].endswith("DeepSpeedStrategy")
    assert trainer["strategy"]["init_args"]["stage"] == 2
    assert trainer["precision"] == "bf16-mixed"
    assert type(cli.model.reference).__name__ == "Stored"


def strategy(**options: Any) -> list[str]:
    flags = ["--trainer.strategy", "DeepSpeedStrategy"]
    for name, value in options.items():
        flags += [f"--trainer.strategy.{name}", str(value)]
    return flags


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (strategy(stage=3), "ZeRO stage 3 doesn't work here.*fsdp2"),
        (["--trainer.strategy", "deepspeed_stage_3_offload"], "ZeRO stage 3"),
        (strategy(stage=2, offload_optimizer="true"), "offload takes no torch optimizer"),
        (["--trainer.strategy", "deepspeed_stage_2_offload"], "offload takes no torch optimizer"),
        ([*strategy(stage=2), "--data.token_budget", "4096"], "token_budget doesn't go with DeepSpeed"),
        ([*strategy(stage=2), "--trainer.accumulate_grad_batches", "4"], "would divide the loss by 4"),
        ([*strategy(stage=2), "--guard.non_finite", "skip"], "non_finite skip has no effect"),
        (strategy(config="ds.json"), "cannot be checked"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_fail_or_train_something_else_is_refused(tiny: Path, args: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_only([*options(tiny), *args])


def test_the_same_options_are_taken_without_deepspeed(tiny: Path) -> None:
    args = ["--data.token_budget", "4096", "--trainer.accumulate_grad_batches", "4", "--guard.non_finite", "skip"]
    parse_only([*options(tiny), *args])


def test_a_trainer_made_in_python_is_looked_at_too() -> None:
    class DeepSpeedStrategy:
        def __init__(self, **zero: Any) -> None:
            self.config = {"zero_optimization": zero}

    class Trainer:
        def __init__(self, strategy: Any, budget: int | None = None, callbacks: list[Any] | None = None) -> None:
            self.strategy, self.accumulate_grad_batches, self.callbacks = strategy, 1, callbacks or []
            self.datamodule = type("Data", (), {"token_budget": budget})()

    check_deepspeed_trainer(Trainer(DeepSpeedStrategy(stage=2)))
    check_deepspeed_trainer(Trainer(DeepSpeedStrategy(stage=2), callbacks=[Guard()]))
    check_deepspeed_trainer(Trainer(object(), budget=100, callbacks=[Guard(non_finite="skip")]))
    for trainer in (
        Trainer(DeepSpeedStrategy(stage=3)),
        Trainer(DeepSpeedStrategy(stage=2, offload_optimizer={"device": "cpu"})),
        Trainer(DeepSpeedStrategy(stage=2), budget=100),
        Trainer(DeepSpeedStrategy(stage=2), callbacks=[Guard(non_finite="skip")]),
    ):
        with pytest.raises(ConfigError):
            check_deepspeed_trainer(trainer)


def test_lightning_resolves_the_overlay_to_zero_stage_2() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed isn't installed: Lightning's resolved config wasn't looked at")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    given = yaml.safe_load(OVERLAYS[0].read_text(encoding="utf-8"))["trainer"]["strategy"]["init_args"]
    made = DeepSpeedStrategy(**{name: value for name, value in given.items() if name != "timeout"})
    zero = made.config["zero_optimization"]
    assert zero["stage"] == 2
    assert "offload_optimizer" not in zero
    assert "offload_param" not in zero
    assert made.config["zero_allow_untested_optimizer"]  # torch's AdamW
    assert made.exclude_frozen_parameters
