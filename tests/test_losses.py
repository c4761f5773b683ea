"""Law 6 for every loss there is, and each against its paper's formula by another route."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rap_lightning.losses as losses
from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.errors import ConfigError
from rap_lightning.losses import DPO, Hinge, PreferenceLoss, SimPO


def subclasses(base: type) -> list[type]:
    own = [c for c in base.__subclasses__() if c.__module__.startswith(losses.__name__)]
    return own + [c for child in own for c in subclasses(child)]


LOSSES = subclasses(PreferenceLoss)


def call(loss: Any, policy: PairLogps, reference: PairLogps) -> torch.Tensor:
    options = {"rewards": PairRewards(torch.full((len(policy.chosen),), 8.0), torch.full((len(policy.chosen),), 3.0))}
    return loss(
        *((policy, reference) if loss.needs_reference else (policy,)), **(options if loss.needs_rewards else {})
    )


def logps(chosen: Any, rejected: Any, lengths: tuple[int, int] = (7, 9)) -> PairLogps:
    chosen, rejected = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (chosen, rejected))
    return PairLogps(chosen, rejected, *(torch.full((len(chosen),), n) for n in lengths))


def log_sigmoid(x: float) -> float:
    """By the series of math.log1p, not by torch."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


FORMULAS: list[tuple[Any, Callable[[float, float, float, float], float]]] = [
    (DPO(0.3), lambda w, x, rw, rx: -log_sigmoid(0.3 * ((w - rw) - (x - rx)))),
    (
        DPO(0.3, label_smoothing=0.2),
        lambda w, x, rw, rx: -0.8 * log_sigmoid(0.3 * (w - rw - x + rx)) - 0.2 * log_sigmoid(0.3 * (x - rx - w + rw)),
    ),
    (Hinge(0.3), lambda w, x, rw, rx: max(0.0, 1 - 0.3 * ((w - rw) - (x - rx)))),
    (SimPO(2.0, gamma=0.7), lambda w, x, rw, rx: -log_sigmoid(2 * w / 7 - 2 * x / 9 - 0.7)),
]


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=[str(loss) for loss, _ in FORMULAS])
def test_values_equal_the_papers_formula(loss: Any, formula: Callable[..., float]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        w, x, rw, rx = (torch.randn(4, generator=generator, dtype=torch.float64) * 20 - 40).tolist()
        value = float(call(loss, logps(w, x), logps(rw, rx)))
        assert value == pytest.approx(formula(w, x, rw, rx), rel=1e-12, abs=1e-12)


def test_every_loss_is_checked_against_a_formula() -> None:
    assert {type(loss) for loss, _ in FORMULAS} == set(LOSSES)


@pytest.mark.parametrize("kind", LOSSES)
def test_extreme_log_ratios_stay_finite_with_finite_gradients(kind: type) -> None:
    chosen = torch.tensor([0.0, 1e4, -1e4, 1e4, -1e4], requires_grad=True)
    rejected = torch.tensor([0.0, -1e4, 1e4, 1e4, -1e4], requires_grad=True)
    lengths = torch.ones(5, dtype=torch.int64)
    policy = PairLogps(chosen, rejected, lengths, lengths)
    values = call(kind(), policy, logps([0.0] * 5, [0.0] * 5))
    assert values.shape == (5,)
    assert values.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), (chosen, rejected)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_at_zero_margin_the_gradient_raises_chosen_and_lowers_rejected(kind: type) -> None:
    chosen, rejected = (torch.tensor([-30.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([10])
    values = call(kind(), PairLogps(chosen, rejected, lengths, lengths), logps(-30.0, -30.0))
    d_chosen, d_rejected = torch.autograd.grad(values.sum(), (chosen, rejected))
    assert d_chosen < 0 < d_rejected


def test_dpo_at_zero_margin_is_log_two() -> None:
    for smoothing in (0.0, 0.3):
        value = DPO(0.01, smoothing)(logps(-12.5, -80.0), logps(-12.5, -80.0))
        assert abs(float(value) - math.log(2)) < 1e-15


@pytest.mark.parametrize("kind", LOSSES)
def test_beta_must_be_positive(kind: type) -> None:
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="beta must be above 0"):
            kind(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_stays_below_a_half(smoothing: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        DPO(0.1, smoothing)


def test_options_show_at_the_start_of_a_run() -> None:
    assert str(DPO(0.01, 0.3)) == "DPO(beta=0.01, label_smoothing=0.3)"
