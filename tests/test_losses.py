"""Laws 5 and 6 over every loss there is, found without a list: a loss added tomorrow is tested too."""

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from loss_cases import LOSSES, call, logps, make, random_logps, rewards_for, taken
from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.errors import ConfigError
from rap_lightning.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    LDDPO,
    ODPO,
    ORPO,
    RDPO,
    REBEL,
    SFT,
    WPO,
    AlphaDPO,
    AlphaPO,
    DiscoPOP,
    DPOPositive,
    ForwardKLDPO,
    Hinge,
    InfoNCA,
    JensenShannonDPO,
    LengthNormalisedDPO,
    MarginDPO,
    Mixture,
    RobustDPO,
    RPOSquared,
    SimPO,
    SoftLabelDPO,
)  # fmt: skip
from rap_lightning.losses.base import PreferenceLoss, bounded_exp, live, over_ranks
from rap_lightning.losses.divergences import DivergenceDPO
from rap_lightning.losses.reward_aware import GapLoss

REWARD_AWARE = [kind for kind in LOSSES if "rewards" in kind.requires]


def test_the_family_is_whole() -> None:
    assert len(LOSSES) >= 37
    assert len(REWARD_AWARE) >= 11


@pytest.mark.parametrize("kind", LOSSES)
def test_the_docstring_gives_formula_options_and_source(kind: Any) -> None:
    text = inspect.cleandoc(kind.__doc__)
    first = text.splitlines()[0]
    assert len(first) < 120
    assert first[-1] in ".:", "one line says what it is, for the list in --help"
    assert "https://" in text or kind is SFT
    options = [name for name in inspect.signature(kind).parameters if name != "self"]
    for option in options:
        assert f"{option}: " in text, f"{kind.__name__} does not describe {option}"


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite_with_finite_gradients(kind: Any, dtype: torch.dtype) -> None:
    # log-probabilities from -2e4 to 0 against -1e4: log-ratios of 0 and ±1e4, each with each
    sides = torch.tensor([-2e4, -1e4, 0.0], dtype=dtype)
    chosen, rejected = (side.clone().requires_grad_() for side in torch.cartesian_prod(sides, sides).unbind(1))
    policy = logps(chosen, rejected, (2, 3), dtype)
    values = call(make(kind), policy, logps([-1e4] * 9, [-1e4] * 9, (2, 3), dtype), rewards_for(9))
    assert values.shape == (9,)
    assert values.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), (chosen, rejected), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_float32_in_float32_out(kind: Any) -> None:
    policy, reference = (logps([-9.0, -8.0], [-7.0, -9.5], dtype=torch.float32) for _ in range(2))
    rewards = PairRewards(torch.tensor([8.0, 6.0]), torch.tensor([3.0, 2.0]))
    assert call(make(kind), policy, reference, rewards).dtype == torch.float32


@pytest.mark.parametrize("kind", LOSSES)
def test_at_policy_equal_reference_the_implicit_rewards_are_zero(kind: Any) -> None:
    """Law 5, as far as it is the loss's: the rest is the reference's."""
    loss, same = make(kind), random_logps(4, seed=1)
    chosen, rejected = loss.implicit_rewards(same, same if "reference" in loss.requires else None)
    assert chosen.shape == rejected.shape == (4,)
    if "reference" in loss.requires and not isinstance(loss, Mixture):
        assert torch.equal(chosen, torch.zeros_like(chosen))
        assert torch.equal(rejected, torch.zeros_like(rejected))


def slopes(loss: Any, rewards: PairRewards | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient in chosen and rejected where policy and reference agree, both responses alike but for their lengths."""
    chosen, rejected = (torch.tensor([-30.0] * 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values = call(loss, logps(chosen, rejected, (10, 10)), logps([-30.0] * 3, [-30.0] * 3, (10, 10)), rewards)
    grads = torch.autograd.grad(values.sum(), (chosen, rejected), allow_unused=True)
    return tuple(torch.zeros(3) if g is None else g for g in grads)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", LOSSES)
def test_at_zero_margin_the_gradient_raises_chosen_and_lowers_rejected(kind: Any) -> None:
    loss = make(kind)
    d_chosen, d_rejected = slopes(loss)
    holds = bool((d_chosen < 0).all() and (d_rejected > 0).all())
    if not loss.at_zero_margin or isinstance(loss, Mixture):
        assert holds
    else:
        assert len(loss.at_zero_margin) > 20, "the exemption must give its reason"
        assert not holds, f"{kind.__name__} is exempt without need"


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_that_of_the_value(kind: Any) -> None:
    loss, policy = make(kind), random_logps(4, seed=2)
    reference = random_logps(4, seed=3, lengths=(policy.chosen_lengths, policy.rejected_lengths))

    def of_sums(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return call(loss, replace(policy, chosen=chosen, rejected=rejected), reference)

    def of_tokens(values: torch.Tensor) -> torch.Tensor:
        assert policy.tokens is not None
        return call(loss, replace(policy, tokens=replace(policy.tokens, logps=values)), reference)

    sums = tuple(x.clone().requires_grad_() for x in (policy.chosen, policy.rejected))
    if not ("tokens" in loss.requires and "collisions" not in loss.requires):
        assert torch.autograd.gradcheck(of_sums, sums)
    else:
        assert policy.tokens is not None
        assert torch.autograd.gradcheck(of_tokens, (policy.tokens.logps.clone().requires_grad_(),))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_pairs_value_is_its_own_unless_the_class_says_otherwise(kind: Any) -> None:
    """What makes accumulation and any number of devices equal one batch."""
    loss, policy = make(kind), random_logps(6, seed=4)
    reference = random_logps(6, seed=5, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    whole = call(loss, policy, reference, rewards_for(6))
    some = [4, 1, 3]
    rewards = PairRewards(*(x[torch.tensor(some)] for x in (rewards_for(6).chosen, rewards_for(6).rejected)))
    part = call(loss, taken(policy, some), taken(reference, some), rewards)
    same = torch.allclose(whole[torch.tensor(some)], part, rtol=1e-12, atol=1e-12)
    assert same is not bool(loss.batch_level)


@pytest.mark.parametrize("kind", LOSSES)
def test_pairs_of_weight_zero_change_nothing(kind: Any) -> None:
    loss, policy = make(kind), random_logps(5, seed=6)
    assert policy.unrelated is not None
    policy = replace(policy, unrelated=policy.unrelated + 30)  # a divergence that no clamp hides
    reference = random_logps(5, seed=7, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    live = [0, 2, 3]
    rewards = rewards_for(5)
    whole = call(loss, replace(policy, weights=weights), replace(reference, weights=weights), rewards)
    fewer = PairRewards(rewards.chosen[live], rewards.rejected[live])
    part = call(loss, taken(policy, live), taken(reference, live), fewer)
    torch.testing.assert_close(whole[live], part)


DEFAULTS: dict[str, dict[str, Any]] = {
    "AOT": {"beta": 0.1}, "AOTUnpaired": {"beta": 0.1}, "APODown": {"beta": 0.1}, "APOZero": {"beta": 0.1},
    "AlphaDPO": {"beta": 0.1, "alpha": 0.5}, "AlphaPO": {"beta": 2.5, "gamma": 0.25, "alpha": 0.25},
    "BCO": {"beta": 0.01}, "CPO": {"beta": 0.1, "nll_weight": 1.0}, "DPO": {"beta": 0.1, "label_smoothing": 0.0},
    "DPOPositive": {"beta": 0.3, "penalty": 50.0}, "DiscoPOP": {"beta": 0.05, "tau": 0.05},
    "DistilledDPO": {"beta": 0.1}, "EXO": {"beta": 0.1, "label_smoothing": 0.001}, "ForwardKLDPO": {"beta": 0.1},
    "GapWeightedDPO": {"beta": 0.1}, "Hinge": {"beta": 0.1}, "IPO": {"beta": 0.1, "per_token": False},
    "InfoNCA": {"beta": 0.01, "temperature": 1.0}, "JensenShannonDPO": {"beta": 0.1},
    "KTO": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, "LDDPO": {"beta": 0.1, "alpha": 0.5},
    "LengthNormalisedDPO": {"beta": 5.0}, "MarginDPO": {"beta": 0.1, "scale": 1 / 3}, "Mixture": {"weights": None},
    "NCA": {"beta": 0.01}, "ODPO": {"beta": 0.1, "alpha": 1.0}, "ORPO": {"odds_weight": 0.1},
    "RDPO": {"beta": 0.1, "alpha": 0.05}, "REBEL": {"eta": 1.0}, "RPOBackwardKL": {"beta": 0.1, "eta": 1.0},
    "RPOForwardKL": {"beta": 0.1, "eta": 1.0}, "RPOSquared": {"beta": 0.1, "eta": 1.0},
    "RewardNCA": {"beta": 0.01, "temperature": 1.0}, "RobustDPO": {"beta": 0.1, "label_smoothing": 0.1}, "SFT": {},
    "SPPOHard": {"beta": 0.001}, "SimPO": {"beta": 2.0, "gamma": 1.0},
    "SoftLabelDPO": {"beta": 0.1, "temperature": 1.0}, "WPO": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
def test_defaults_are_those_that_runs_without_options_were_made_with(kind: Any) -> None:
    expected = DEFAULTS[kind.__name__] | ({"distance": "absolute"} if "rewards" in kind.requires else {})
    signature = inspect.signature(kind).parameters
    found = {name: p.default for name, p in signature.items() if name not in ("losses", "loss")}
    assert found == expected
    loss = make(kind)
    for name in set(found) - {"eta", "odds_weight", "weights"}:
        assert getattr(loss, name) == found[name], "an option is kept under its name"


def test_each_loss_declares_what_it_needs_and_no_more() -> None:
    def that(need: str) -> set[str]:
        return {kind.__name__ for kind in LOSSES if need in make(kind).requires}

    assert {kind.__name__ for kind in LOSSES} - that("reference") == {"SimPO", "AlphaPO", "CPO", "ORPO", "SFT"}
    assert that("rewards") == {
        "ODPO", "MarginDPO", "RPOSquared", "RPOBackwardKL", "RPOForwardKL", "DistilledDPO", "REBEL", "GapWeightedDPO",
        "SoftLabelDPO", "InfoNCA", "RewardNCA",
    }  # fmt: skip
    assert that("tokens") == {"LDDPO", "WPO"}
    assert that("collisions") == {"WPO"}
    assert that("unrelated") == {"KTO"}
    assert {kind.__name__ for kind in LOSSES if make(kind).batch_level} == {"AOT", "AOTUnpaired", "KTO"}
    assert {kind.__name__: make(kind).least_pairs for kind in LOSSES if make(kind).least_pairs != 1} == {
        "AOT": 2, "AOTUnpaired": 2, "KTO": 2,
    }  # fmt: skip


def test_implicit_rewards_are_as_each_docstring_says() -> None:
    policy = random_logps(4, seed=26)
    reference = random_logps(4, seed=27, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    sums = (policy.chosen, policy.rejected)
    lengths = (policy.chosen_lengths, policy.rejected_lengths)
    ratios = (policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    means = [x / n for x, n in zip(sums, lengths, strict=True)]
    expected: list[tuple[Any, list[torch.Tensor]]] = [
        (CPO(0.3), [0.3 * x for x in sums]),
        (SFT(), means),
        (ORPO(0.5), [x - torch.log(1 - torch.exp(x)) for x in means]),
        (SimPO(2.0), [2 * x for x in means]),
        (AlphaPO(2.0, alpha=0.5), [2 * (1 - torch.exp(-0.5 * x)) / 0.5 for x in means]),
        (AlphaPO(2.0, alpha=-0.5), [2 * (1 - torch.exp(0.5 * x)) / -0.5 for x in means]),
        (REBEL(4.0), [x / 4 for x in ratios]),
        (RDPO(0.3), [0.3 * x for x in ratios]),
        (KTO(0.3), [0.3 * x for x in ratios]),
        (IPO(0.3), [0.3 * x for x in ratios]),
        (IPO(0.3, per_token=True), [0.3 * x / n for x, n in zip(ratios, lengths, strict=True)]),
        (LengthNormalisedDPO(2.0), [2 * x / n for x, n in zip(ratios, lengths, strict=True)]),
        (ForwardKLDPO(0.3), [0.3 * (1 - torch.exp(-x)) for x in ratios]),
        (JensenShannonDPO(0.3), [0.3 * torch.log(2 / (1 + torch.exp(-x))) for x in ratios]),
        (AlphaDPO(0.3, alpha=0.4), [0.3 * (1 - torch.exp(-0.4 * x)) / 0.4 for x in ratios]),
    ]
    for loss, wanted in expected:
        found = loss.implicit_rewards(policy, reference if "reference" in loss.requires else None)
        torch.testing.assert_close(list(found), wanted, msg=str(loss))


def test_cpo_without_imitation_is_allowed_and_is_its_contrast_alone() -> None:
    policy = random_logps(4, seed=28)
    assert CPO(nll_weight=0).nll_weight == 0
    expected = -torch.nn.functional.logsigmoid(0.1 * (policy.chosen - policy.rejected))
    torch.testing.assert_close(CPO(nll_weight=0)(policy), expected)


@pytest.mark.parametrize("kind", REWARD_AWARE)
def test_under_a_goal_the_gap_is_the_distance_that_was_asked_for(kind: Any) -> None:
    rewards = PairRewards(torch.tensor([8.0, 3.0]), torch.tensor([3.0, 8.0]), torch.tensor([8.0, 3.0]))
    assert kind().gap(rewards).tolist() == kind(distance="absolute").gap(rewards).tolist() == [5.0, 5.0]
    assert kind(distance="squared").gap(rewards).tolist() == [25.0, 25.0]


def test_a_gap_of_zero_leaves_the_offset_finite() -> None:
    m, gap = torch.tensor([0.5, 0.5]), torch.tensor([0.0, -1.0])
    value = ODPO().compare(m, gap)
    assert value.isfinite().all()
    assert value.tolist() == pytest.approx([0.0, 0.0], abs=1e-6), "nothing to win by"


def test_an_exponential_goes_on_as_its_tangent_beyond_e_to_the_30() -> None:
    x = torch.tensor([-1.0, 29.5, 30.0, 30.5, 32.0, 1e4], dtype=torch.float64, requires_grad=True)
    value = bounded_exp(x)
    top = math.exp(30)
    expected = [math.exp(-1), math.exp(29.5), top, 1.5 * top, 3 * top, (1e4 - 29) * top]
    assert value.tolist() == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.tolist() == pytest.approx([math.exp(-1), math.exp(29.5), top, top, top, top], rel=1e-12)


# -- rewards under goals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REWARD_AWARE)
@pytest.mark.parametrize("distance", ["absolute", "squared"])
def test_a_reward_aware_loss_never_pushes_against_the_relabelling(kind: Any, distance: str) -> None:
    """Under the lower reward as goal, the response with the lower reward is chosen, and must be raised."""
    low, high = torch.full((3,), 3.0).double(), torch.full((3,), 8.0).double()
    loss = kind(distance=distance)
    halves = [slopes(loss, PairRewards(*pair, pair[0])) for pair in ((high, low), (low, high))]
    for d_chosen, d_rejected in halves:
        assert (d_chosen < 0).all()
        assert (d_rejected > 0).all()
    torch.testing.assert_close(halves[0], halves[1], msg="the two goals of a pair weigh the same")


@pytest.mark.parametrize("kind", REWARD_AWARE)
def test_without_a_goal_the_judges_own_rewards_count(kind: Any) -> None:
    for distance in ("absolute", "squared"):
        loss = kind(distance=distance)
        assert loss.gap(PairRewards(torch.tensor([8.0]), torch.tensor([3.0]), torch.tensor([torch.nan]))).item() == 5.0
        assert loss.gap(PairRewards(torch.tensor([3.0]), torch.tensor([8.0]))).item() == -5.0


def test_soft_labels_are_those_of_the_papers_reward_under_the_goal() -> None:
    """σ((|g - r_l|² - |g - r_w|²) / T), under an own goal, the best one, and one between."""
    won, lost, goals = (torch.tensor(v).double() for v in ([8.0, 3.0, 8.0, 8.0], [3.0, 8.0, 3.0, 3.0], [8, 3, 10, 6]))
    m = torch.linspace(-1, 2, 4).double()
    zeros, lengths = torch.zeros(4).double(), torch.ones(4, dtype=torch.int64)
    policy, reference = PairLogps(m, zeros, lengths, lengths), PairLogps(zeros, zeros, lengths, lengths)
    p = torch.sigmoid(((goals - lost) ** 2 - (goals - won) ** 2) / 20)
    expected = -p * torch.sigmoid(0.5 * m).log() - (1 - p) * torch.sigmoid(-0.5 * m).log()
    loss = SoftLabelDPO(0.5, temperature=20, distance="squared")
    torch.testing.assert_close(loss(policy, reference, PairRewards(won, lost, goals)), expected)


def test_rewards_under_a_goal_are_the_papers() -> None:
    rewards = PairRewards(
        torch.tensor([8.0, 3.0, 8.0, 8.0]), torch.tensor([3.0, 8.0, 3.0, 3.0]),
        torch.tensor([8.0, 3.0, torch.nan, 10.0]),
    )  # fmt: skip
    for power, missed, best in ((1, -5.0, [-2.0, -7.0]), (2, -25.0, [-4.0, -49.0])):
        under = rewards.under_goal(power)
        assert under.chosen.tolist() == [0.0, 0.0, 8.0, best[0]]
        assert under.rejected.tolist() == [missed, missed, 3.0, best[1]]


# -- state ------------------------------------------------------------------------------------------------------------


def test_bco_shifts_by_the_mean_reward_of_the_steps_before() -> None:
    loss = BCO(0.5).train()
    zero = logps([0.0, 0.0], [0.0, 0.0])
    policy = replace(logps([2.0, 100.0], [4.0, 100.0]), weights=torch.tensor([1.0, 0.0]))
    first = call(loss, policy, zero)
    assert first[0].item() == pytest.approx(-log_sigmoid(1.0) - log_sigmoid(-2.0))
    assert loss.delta == 0.0, "nothing changes within a step"
    call(loss, logps([6.0, 6.0], [0.0, 0.0]), zero)
    loss.after_step()
    assert loss.delta.item() == pytest.approx((1 + 2 + 3 + 3 + 0 + 0) / 6), "pairs of weight 0 do not count"
    loss.eval()
    value = call(loss, policy, zero)
    call(loss, logps([50.0], [50.0]), logps([0.0], [0.0]))
    loss.after_step()
    assert value[0].item() == pytest.approx(-log_sigmoid(1.0 - 1.5) - log_sigmoid(1.5 - 2.0))
    assert loss.delta.item() == pytest.approx(1.5), "evaluation leaves no trace"
    again = BCO(0.5)
    again.load_state_dict(loss.state_dict())
    assert again.delta == loss.delta


def test_a_count_survives_a_half_precision_conversion() -> None:
    loss = BCO().to(torch.bfloat16).train()
    for _ in range(300):
        call(loss, logps([1.0], [1.0]), logps([0.0], [0.0]))
        loss.after_step()
    assert loss.totals.tolist() == pytest.approx([6.0, 600.0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_needs_what_its_parts_need_and_no_more() -> None:
    free, whole = Mixture([SimPO(), SFT()]), Mixture([DPO(), KTO(), MarginDPO(), LDDPO()])
    assert free.requires == set()
    assert whole.requires == {"reference", "rewards", "tokens", "unrelated"}
    assert whole.least_pairs == 2
    assert whole.batch_level == f"KTO: {KTO.batch_level}"
    policy = random_logps(3, seed=8)
    value = free.per_pair(policy, None, None)
    torch.testing.assert_close(value, SimPO()(policy) + SFT()(policy))
    torch.testing.assert_close(free.terms(), {"SimPO": SimPO()(policy), "SFT": SFT()(policy)})


def test_weights_of_a_mixture_may_be_as_small_as_one_likes() -> None:
    policy, reference = random_logps(3, seed=24), random_logps(3, seed=25)
    expected = 0.25 * DPO()(policy, reference) + 1e-3 * SFT()(policy)
    torch.testing.assert_close(call(Mixture([DPO(), SFT()], [0.25, 1e-3]), policy, reference), expected)


def test_totals_are_summed_over_ranks_and_the_ranks_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.tensor([1.0, 2.0])
    assert over_ranks(own) is own, "one process has nothing to add"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
    assert over_ranks(own).tolist() == [3.0, 6.0]
    assert own.tolist() == [1.0, 2.0]


def test_pairs_that_count_are_found_on_the_device_of_the_pairs() -> None:
    one = torch.zeros(4, device="meta")
    assert live(PairLogps(one, one, one, one)).device.type == "meta"
    own = torch.zeros(4)
    assert live(PairLogps(own, own, own, own)).tolist() == [0, 1, 2, 3]
    assert live(PairLogps(own, own, own, own, weights=torch.tensor([0.0, 0.5, 0.0, 1.0]))).tolist() == [1, 3]


def test_kto_estimates_its_divergence_from_two_pairs_on_and_without_a_gradient() -> None:
    policy, reference = random_logps(2, seed=29), random_logps(2, seed=30)
    assert policy.unrelated is not None
    assert reference.unrelated is not None
    raised = (policy.unrelated + 50).requires_grad_()
    z = KTO().divergence(replace(policy, unrelated=raised), reference)
    assert not z.requires_grad
    torch.testing.assert_close(z, (raised.detach() - reference.unrelated).mean())
    one = replace(policy, unrelated=raised, weights=torch.tensor([1.0, 0.0]))
    assert KTO().divergence(one, reference) == 0


def test_bco_counts_in_float64() -> None:
    assert BCO().totals.dtype == torch.float64


def test_terms_that_come_twice_are_numbered() -> None:
    assert list(Mixture([DPO(), DPO(0.2), SFT()]).term_names()) == ["DPO", "DPO-2", "SFT"]


def test_a_mixtures_running_mean_is_kept() -> None:
    loss = Mixture([DPO(), BCO(1.0)], [1.0, 0.5]).train()
    loss.per_pair(logps([2.0], [2.0]), logps([0.0], [0.0]), None)
    loss.after_step()
    assert "losses.1.totals" in loss.state_dict()
    assert loss.parts[1].delta == 2.0  # type: ignore[attr-defined]


def test_a_mixture_passes_on_a_skipped_step_and_has_no_terms_before_its_first() -> None:
    loss = Mixture([DPO(), BCO(1.0)], [1.0, 0.5]).train()
    assert loss.terms() == {}
    loss.per_pair(logps([2.0], [2.0]), logps([0.0], [0.0]), None)
    loss.forget_step()
    loss.after_step()
    assert loss.parts[1].delta == 0.0  # type: ignore[attr-defined]
    plain = DPO()
    assert (plain.terms(), list(plain.term_names())) == ({}, [])


def test_implicit_rewards_of_a_combination_are_those_of_its_first_part() -> None:
    policy, reference = random_logps(3, seed=20), random_logps(3, seed=21)
    for combined, first in ((Mixture([Hinge(0.4), DPO(0.1)]), Hinge(0.4)), (WPO(Hinge(0.4)), Hinge(0.4))):
        torch.testing.assert_close(
            combined.implicit_rewards(policy, reference), first.implicit_rewards(policy, reference)
        )


@pytest.mark.parametrize("kind", [PreferenceLoss, DivergenceDPO, GapLoss])
def test_what_a_subclass_must_write_is_asked_of_it(kind: Any) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind()


def test_wpo_of_a_reward_aware_loss_gets_the_rewards() -> None:
    policy, rewards = random_logps(3, seed=22), rewards_for(3)
    reference = random_logps(3, seed=23, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    loss, part = WPO(MarginDPO(0.3)), MarginDPO(0.3)
    assert "rewards" in loss.requires
    expected = loss.pair_weights(policy) * part(policy, reference, rewards=rewards)
    torch.testing.assert_close(call(loss, policy, reference, rewards), expected)


def test_wpo_weights_another_loss_without_a_gradient_of_its_own() -> None:
    policy, loss = random_logps(3, seed=9), WPO(Hinge(0.3))
    assert policy.tokens is not None
    tokens = replace(policy.tokens, logps=policy.tokens.logps.clone().requires_grad_())
    weights = loss.pair_weights(replace(policy, tokens=tokens))
    assert not weights.requires_grad
    reference = random_logps(3, seed=10, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    torch.testing.assert_close(call(loss, policy, reference), weights * Hinge(0.3)(policy, reference))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in LOSSES if "beta" in inspect.signature(k).parameters])
def test_beta_must_be_positive(kind: Any) -> None:
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"{kind.__name__}: beta must be above 0, found"):
            kind(beta=beta)
    with pytest.raises(ConfigError, match=f"{kind.__name__}: beta must be finite"):
        kind(beta=float("inf"))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: DPO(label_smoothing=0.5), r"DPO: label_smoothing must be from 0 to below 0\.5, found 0\.5"),
        (lambda: DPO(label_smoothing=-0.1), "DPO: label_smoothing"),
        (lambda: RobustDPO(label_smoothing=0.5), r"RobustDPO: label_smoothing must be from 0 to below 0\.5"),
        (lambda: RobustDPO(label_smoothing=1.0), "RobustDPO: label_smoothing"),
        (lambda: EXO(label_smoothing=0.0), "EXO: label_smoothing must be above 0"),
        (lambda: DiscoPOP(tau=0.0), "DiscoPOP: tau must be above 0"),
        (lambda: DPOPositive(penalty=0.0), "DPOPositive: penalty must be above 0"),
        (lambda: RDPO(alpha=-1.0), "RDPO: alpha must be above 0"),
        (lambda: LDDPO(alpha=1.0), "LDDPO: alpha must be from 0 to below 1"),
        (lambda: AlphaDPO(alpha=1.0), "AlphaDPO: alpha must be above 0 to below 1"),
        (lambda: AlphaPO(alpha=0.0), "AlphaPO: alpha must be above 0"),
        (lambda: CPO(nll_weight=-1.0), "CPO: nll_weight must be above 0"),
        (lambda: KTO(desirable_weight=0.0), "KTO: desirable_weight must be above 0"),
        (lambda: REBEL(eta=0.0), "REBEL: eta must be above 0"),
        (lambda: SoftLabelDPO(temperature=0.0), "SoftLabelDPO: temperature must be above 0"),
        (lambda: InfoNCA(temperature=-1.0), "InfoNCA: temperature must be above 0"),
        (lambda: KTO(undesirable_weight=-2.0), "KTO: undesirable_weight must be above 0"),
        (lambda: ODPO(alpha=0.0), "ODPO: alpha must be above 0"),
        (lambda: MarginDPO(scale=0.0), "MarginDPO: scale must be above 0"),
        (lambda: RPOSquared(eta=0.0), "RPOSquared: eta must be above 0"),
        (lambda: ORPO(odds_weight=0.0), "ORPO: odds_weight must be above 0"),
        (lambda: Mixture([]), "Mixture: losses is empty"),
        (lambda: Mixture([DPO(), SFT()], [1.0]), "Mixture: 2 losses but 1 weights"),
        (lambda: Mixture([DPO(), SFT()], [0.0, 0.0]), "sum to more than 0"),
        (lambda: Mixture([DPO(), SFT()], [1.0, -1.0]), "0 or more"),
        (lambda: Mixture([DPO()], [float("nan")]), "0 or more"),
        (lambda: WPO(AOT()), "sorted within the batch"),
    ],
)
def test_options_that_make_no_sense_are_refused(make_it: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_it()


def test_options_show_at_the_start_of_a_run() -> None:
    assert str(DPO(0.01, 0.3)) == "DPO(beta=0.01, label_smoothing=0.3)"
    assert str(IPO(0.1, per_token=True)) == "IPO(beta=0.1, per_token=True)"
    assert str(SoftLabelDPO(0.25, 12.0, "squared")) == "SoftLabelDPO(beta=0.25, temperature=12.0, distance=squared)"
    assert "Mixture" in str(Mixture([DPO(), SFT()], [1, 2]))
    assert "requires" not in str(WPO(DPO()))

    class Own(DPO):
        def __init__(self) -> None:
            super().__init__(0.2, 0.1)
            self._steps, self.name = 3, "own"

    assert str(Own()) == "Own(beta=0.2, label_smoothing=0.1)"


def test_dpo_at_zero_margin_is_log_two() -> None:
    for smoothing in (0.0, 0.3):
        value = DPO(0.01, smoothing)(logps(-12.5, -80.0), logps(-12.5, -80.0))
        assert abs(float(value) - math.log(2)) < 1e-15


def test_pairs_from_segments_keep_their_order() -> None:
    pairs = PairLogps.from_segments(torch.arange(6.0), torch.arange(6) + 1)
    assert pairs.chosen.tolist() == [0, 2, 4]
    assert pairs.rejected_lengths.tolist() == [2, 4, 6]
