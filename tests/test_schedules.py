"""Schedules of transformers by name: the rates of transformers' own functions, refused early, resumed exactly."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import optimization

from conftest import called
from rap_lightning.errors import ConfigError
from rap_lightning.training.schedules import TransformersSchedule
from test_fit import assert_same, weights
from test_resume import fit, stopped

STEPS = 40
CASES: dict[str, tuple[float, dict[str, Any], Any]] = {
    "linear": (0.1, {}, lambda o: optimization.get_linear_schedule_with_warmup(o, 4, STEPS)),
    "cosine": (0.1, {}, lambda o: optimization.get_cosine_schedule_with_warmup(o, 4, STEPS)),
    "cosine_with_restarts": (
        0.09, {"num_cycles": 3},
        lambda o: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(o, 4, STEPS, num_cycles=3),
    ),
    "polynomial": (0.1, {"power": 2.0}, lambda o: optimization.get_polynomial_decay_schedule_with_warmup(
        o, 4, STEPS, power=2.0)),
    "constant": (0.0, {}, optimization.get_constant_schedule),
    "constant_with_warmup": (0.1, {}, lambda o: optimization.get_constant_schedule_with_warmup(o, 4)),
    "inverse_sqrt": (0.1, {"timescale": 9}, lambda o: optimization.get_inverse_sqrt_schedule(o, 4, timescale=9)),
    "cosine_with_min_lr": (
        0.1, {"min_lr_rate": 0.2},
        lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, 4, STEPS, min_lr_rate=0.2),
    ),
    "cosine_warmup_with_min_lr": (
        0.1, {"min_lr_rate": 0.2, "warmup_lr_rate": 0.5},
        lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            o, 4, STEPS, min_lr_rate=0.2, warmup_lr_rate=0.5),
    ),
    "warmup_stable_decay": (
        0.1, {"num_decay_steps": 10, "decay_type": "1-sqrt"},
        lambda o: optimization.get_wsd_schedule(o, 4, 10, num_training_steps=STEPS, decay_type="1-sqrt"),
    ),
}  # fmt: skip


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def rates(over: torch.optim.Optimizer, scheduler: Any, steps: int = STEPS + 1) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(over.param_groups[0]["lr"])
        over.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_of_transformers_own_functions(name: Any) -> None:
    ratio, options, make = CASES[name]
    own, theirs = optimizer(), optimizer()
    found = rates(own, TransformersSchedule(name, ratio, options)(own, STEPS))
    assert found == rates(theirs, make(theirs))
    assert max(found) == 2.0


@pytest.mark.parametrize("name", ["linear", "warmup_stable_decay"])
def test_a_schedule_continues_from_its_state(name: Any) -> None:
    ratio, options, _ = CASES[name]
    whole, first, second = optimizer(), optimizer(), optimizer()
    schedule = TransformersSchedule(name, ratio, options)
    expected = rates(whole, schedule(whole, STEPS))
    begun = schedule(first, STEPS)
    rates(first, begun, 17)
    saved = io.BytesIO()
    torch.save({"scheduler": begun.state_dict(), "optimizer": first.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    again = schedule(second, STEPS)
    second.load_state_dict(state["optimizer"])
    again.load_state_dict(state["scheduler"])
    assert rates(second, again, STEPS + 1 - 17) == expected[17:]


@pytest.mark.slow
def test_a_run_with_one_is_resumed_exactly(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    schedule = TransformersSchedule("cosine_with_min_lr", 0.2, {"min_lr_rate": 0.1})
    whole = fit(tmp_path / "whole", tiny, pairs_folder, schedule=schedule)
    ckpt = stopped(tmp_path / "part", tiny, pairs_folder, "on_before_optimizer_step", 4, schedule=schedule)
    assert_same(weights(fit(tmp_path / "rest", tiny, pairs_folder, ckpt=ckpt, schedule=schedule)), weights(whole))


@pytest.mark.parametrize(
    ("name", "ratio", "options", "message"),
    [
        ("linear", 0.1, {"min_lr_rate": 0.1}, "unexpected keyword argument 'min_lr_rate'"),
        ("cosine_with_min_lr", 0.1, {}, "min_lr"),
        ("warmup_stable_decay", 0.1, {}, "num_decay_steps"),
        ("warmup_stable_decay", 0.1, {"num_decay_steps": 5, "decay_type": "steps"}, "Unknown decay type"),
        ("constant", 0.1, {}, "use constant_with_warmup"),
        ("constant_with_warmup", 0.1, {"power": 2}, "has no options power"),
        ("linear", 1.5, {}, "warmup_ratio must be from 0 to 1"),
        ("linear", 0.1, {"num_training_steps": 7}, "follows from --trainer.max_steps"),
        ("cosine", 0.1, {"num_cycles": "many"}, "num_cycles"),
    ],
)
def test_options_that_can_not_be_are_refused_at_once(name: Any, ratio: float, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersSchedule(name, ratio, options)


def test_a_decay_longer_than_the_run_is_refused() -> None:
    schedule = TransformersSchedule("warmup_stable_decay", 0.5, {"num_decay_steps": 30})
    with pytest.raises(ConfigError, match="20 warm-up steps and num_decay_steps 30 are more than the run's 40 steps"):
        schedule(optimizer(), 40)


def test_the_command_line_knows_it_by_its_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    begin = ("fit", "--model.policy.path", "m", "--data.source", "d", "--model.schedule", "TransformersSchedule")
    assert called(*begin, "--model.schedule.name", "linear", "--print_config") == 0
    assert "class_path: rap_lightning.training.schedules.TransformersSchedule" in capsys.readouterr().out
    assert called(*begin, "--model.schedule.name", "reduce_lr_on_plateau", "--print_config") == 2
    assert "warmup_stable_decay" in capsys.readouterr().err
