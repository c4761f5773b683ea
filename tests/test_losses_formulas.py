"""Law 6: each loss against its paper's formula, written out as printed and computed with 60 digits.

With that many digits the formulas need none of the care that the losses take of overflow and cancellation: an
independent route to the same number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import pytest
import torch
from mpmath import exp, log, mpf

from loss_cases import LOSSES, call, logps, random_logps
from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    LDDPO,
    NCA,
    ODPO,
    ORPO,
    RDPO,
    REBEL,
    SFT,
    WPO,
    AlphaDPO,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    DistilledDPO,
    DPOPositive,
    ForwardKLDPO,
    GapWeightedDPO,
    Hinge,
    InfoNCA,
    JensenShannonDPO,
    LengthNormalisedDPO,
    MarginDPO,
    Mixture,
    RewardNCA,
    RobustDPO,
    RPOBackwardKL,
    RPOForwardKL,
    RPOSquared,
    SimPO,
    SoftLabelDPO,
    SPPOHard,
)

mpmath.mp.dps = 60


@dataclass(frozen=True)
class Pair:
    """One pair in exact numbers: π and π_ref are probabilities of the whole responses, as papers write them."""

    policy: tuple[mpf, mpf]  # log π of chosen and rejected
    reference: tuple[mpf, mpf]
    lengths: tuple[int, int]
    rewards: tuple[mpf, mpf]
    tokens: tuple[list[mpf], list[mpf]] = ((), ())  # type: ignore[assignment]
    reference_tokens: tuple[list[mpf], list[mpf]] = ((), ())  # type: ignore[assignment]
    collisions: tuple[list[mpf], list[mpf]] = ((), ())  # type: ignore[assignment]

    @property
    def ratios(self) -> tuple[mpf, mpf]:
        """π / π_ref of both."""
        return tuple(exp(p) / exp(r) for p, r in zip(self.policy, self.reference, strict=True))  # type: ignore[return-value]

    @property
    def a(self) -> mpf:
        return log(self.ratios[0])

    @property
    def b(self) -> mpf:
        return log(self.ratios[1])

    @property
    def m(self) -> mpf:
        return log(self.ratios[0] / self.ratios[1])

    @property
    def s(self) -> tuple[mpf, mpf]:
        return self.policy[0] / self.lengths[0], self.policy[1] / self.lengths[1]

    @property
    def gap(self) -> mpf:
        return self.rewards[0] - self.rewards[1]


def sigma(x: mpf) -> mpf:
    return 1 / (1 + exp(-x))


def kl(p: mpf, q: mpf) -> mpf:
    """Of two Bernoullis by their probabilities of 1."""
    return p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))


def softmax(*x: mpf) -> list[mpf]:
    whole = sum(exp(v) for v in x)
    return [exp(v) / whole for v in x]


def bradley_terry(p: Pair, beta: float) -> mpf:
    """(π_w/ref_w)^β over the sum of both: the probability of which DPO's equation 7 is the negative log."""
    w, x = (ratio ** mpf(beta) for ratio in p.ratios)
    return w / (w + x)


def smoothed(p: Pair, beta: float, e: float) -> mpf:
    return -(1 - mpf(e)) * log(bradley_terry(p, beta)) - mpf(e) * log(1 - bradley_terry(p, beta))


def robust(p: Pair, beta: float, e: float) -> mpf:
    clean, flipped = -log(bradley_terry(p, beta)), -log(1 - bradley_terry(p, beta))
    return ((1 - mpf(e)) * clean - mpf(e) * flipped) / (1 - 2 * mpf(e))


def discopop(p: Pair, beta: float, tau: float) -> mpf:
    h = mpf(beta) * p.m
    modulation = sigma(h / mpf(tau))
    return (1 - modulation) * log(1 + exp(-h)) + modulation * exp(-h)


def dpop(p: Pair, beta: float, penalty: float) -> mpf:
    fallen = max(mpf(0), log(exp(p.reference[0]) / exp(p.policy[0])))
    return -log(sigma(mpf(beta) * (p.m - penalty * fallen)))


def lddpo(p: Pair, beta: float, alpha: float) -> mpf:
    shared = min(p.lengths)

    def decoupled(tokens: list[mpf]) -> mpf:
        return sum(tokens[:shared]) + mpf(alpha) * sum(tokens[shared:])

    ours = decoupled(p.tokens[0]) - decoupled(p.tokens[1])
    theirs = decoupled(p.reference_tokens[0]) - decoupled(p.reference_tokens[1])
    return -log(sigma(mpf(beta) * (ours - theirs)))


def wpo(p: Pair, beta: float) -> mpf:
    weight = mpf(1)
    for tokens, collisions, length in zip(p.tokens, p.collisions, p.lengths, strict=True):
        product = mpf(1)
        for t, c in zip(tokens, collisions, strict=True):
            product *= exp(t) / exp(c)
        weight *= product ** (mpf(1) / length)
    return -weight * log(bradley_terry(p, beta))


def f_dpo(p: Pair, beta: float, slope: Callable[[mpf], mpf]) -> mpf:
    return -log(sigma(mpf(beta) * slope(p.ratios[0]) - mpf(beta) * slope(p.ratios[1])))


def alphapo(p: Pair, beta: float, gamma: float, alpha: float) -> mpf:
    chosen, rejected = (mpf(beta) * (1 - exp(s) ** -mpf(alpha)) / mpf(alpha) for s in p.s)
    return -log(sigma(chosen - rejected - mpf(gamma)))


def odds(p: mpf) -> mpf:
    return p / (1 - p)


def rewarded_nca(p: Pair, beta: float, temperature: float) -> mpf:
    shares = softmax(*(r / mpf(temperature) for r in p.rewards))
    values = [mpf(beta) * log(ratio) for ratio in p.ratios]
    return -sum(share * log(sigma(v)) + log(sigma(-v)) / 2 for share, v in zip(shares, values, strict=True))


def infonca(p: Pair, beta: float, temperature: float) -> mpf:
    shares = softmax(*(r / mpf(temperature) for r in p.rewards))
    ours = softmax(*(mpf(beta) * log(ratio) for ratio in p.ratios))
    return -sum(share * log(q) for share, q in zip(shares, ours, strict=True))


FORMULAS: list[tuple[Any, Callable[[Pair], mpf]]] = [
    (DPO(0.3), lambda p: -log(bradley_terry(p, 0.3))),
    (DPO(0.3, label_smoothing=0.2), lambda p: smoothed(p, 0.3, 0.2)),
    (RobustDPO(0.3, label_smoothing=0.2), lambda p: robust(p, 0.3, 0.2)),
    (Hinge(0.3), lambda p: max(mpf(0), 1 - mpf(0.3) * p.m)),
    (IPO(0.3), lambda p: (p.m - 1 / (2 * mpf(0.3))) ** 2),
    (IPO(0.3, per_token=True), lambda p: (p.a / p.lengths[0] - p.b / p.lengths[1] - 1 / (2 * mpf(0.3))) ** 2),
    (EXO(0.3, label_smoothing=0.01), lambda p: kl(bradley_terry(p, 0.3), 1 - mpf(0.01))),
    (DiscoPOP(0.3, tau=0.1), lambda p: discopop(p, 0.3, 0.1)),
    (DPOPositive(0.3, penalty=5.0), lambda p: dpop(p, 0.3, 5.0)),
    (LengthNormalisedDPO(2.0), lambda p: -log(sigma(2 * p.a / p.lengths[0] - 2 * p.b / p.lengths[1]))),
    (RDPO(0.3, alpha=0.02), lambda p: -log(sigma(mpf(0.3) * p.m + mpf(0.02) * (p.lengths[0] - p.lengths[1])))),
    (LDDPO(0.3, alpha=0.4), lambda p: lddpo(p, 0.3, 0.4)),
    (NCA(0.3), lambda p: -log(sigma(mpf(0.3) * p.a)) - sum(log(sigma(-mpf(0.3) * v)) for v in (p.a, p.b)) / 2),
    (SPPOHard(0.3), lambda p: (p.a - mpf(1) / mpf(0.3) / 2) ** 2 + (p.b + mpf(1) / mpf(0.3) / 2) ** 2),
    (APOZero(0.3), lambda p: 1 - sigma(mpf(0.3) * p.a) + sigma(mpf(0.3) * p.b)),
    (APODown(0.3), lambda p: sigma(mpf(0.3) * p.a) + 1 - sigma(mpf(0.3) * p.m)),
    (ForwardKLDPO(0.3), lambda p: f_dpo(p, 0.3, lambda u: -1 / u)),
    (JensenShannonDPO(0.3), lambda p: f_dpo(p, 0.3, lambda u: log(2 * u / (1 + u)))),
    (AlphaDPO(0.3, alpha=0.4), lambda p: f_dpo(p, 0.3, lambda u: (1 - u ** -mpf(0.4)) / mpf(0.4))),
    (SimPO(2.0, gamma=0.7), lambda p: -log(sigma(2 * p.s[0] - 2 * p.s[1] - mpf(0.7)))),
    (AlphaPO(2.0, gamma=0.7, alpha=0.5), lambda p: alphapo(p, 2.0, 0.7, 0.5)),
    (CPO(0.3, nll_weight=0.5), lambda p: -log(sigma(mpf(0.3) * (p.policy[0] - p.policy[1]))) - p.s[0] / 2),
    (ORPO(0.3), lambda p: -p.s[0] - mpf(0.3) * log(sigma(log(odds(exp(p.s[0])) / odds(exp(p.s[1])))))),
    (SFT(), lambda p: -p.s[0]),
    (BCO(0.3), lambda p: -log(sigma(mpf(0.3) * p.a)) - log(sigma(-mpf(0.3) * p.b))),
    (ODPO(0.3, alpha=0.5), lambda p: -log(sigma(mpf(0.3) * p.m - log(p.gap) / 2))),
    (MarginDPO(0.3, scale=0.5), lambda p: -log(sigma(mpf(0.3) * p.m - p.gap / 2))),
    (RPOSquared(0.3, eta=0.5), lambda p: (mpf(0.3) * p.m - p.gap / 2) ** 2),
    (RPOBackwardKL(0.3, eta=0.5), lambda p: kl(sigma(p.gap / 2), bradley_terry(p, 0.3))),
    (RPOForwardKL(0.3, eta=0.5), lambda p: kl(bradley_terry(p, 0.3), sigma(p.gap / 2))),
    (DistilledDPO(0.3), lambda p: (p.gap - mpf(0.3) * p.m) ** 2),
    (REBEL(2.0), lambda p: (p.m / 2 - p.gap) ** 2),
    (GapWeightedDPO(0.3), lambda p: -p.gap * log(bradley_terry(p, 0.3))),
    (
        SoftLabelDPO(0.3, temperature=2.0),
        lambda p: -sigma(p.gap / 2) * log(bradley_terry(p, 0.3)) - sigma(-p.gap / 2) * log(1 - bradley_terry(p, 0.3)),
    ),
    (InfoNCA(0.3, temperature=2.0), lambda p: infonca(p, 0.3, 2.0)),
    (RewardNCA(0.3, temperature=2.0), lambda p: rewarded_nca(p, 0.3, 2.0)),
    (
        Mixture([DPO(0.3), SFT(), MarginDPO(0.3, scale=0.5)], [0.8, 0.0, 2.0]),
        lambda p: -mpf(0.8) * log(bradley_terry(p, 0.3)) - 2 * log(sigma(mpf(0.3) * p.m - p.gap / 2)),
    ),
    (WPO(DPO(0.3)), lambda p: wpo(p, 0.3)),
]  # fmt: skip
BATCH_LEVEL = {AOT, AOTUnpaired, KTO}  # their own tests are below


def test_every_loss_is_checked_against_a_formula() -> None:
    assert {type(loss) for loss, _ in FORMULAS} | BATCH_LEVEL == set(LOSSES)


def numbers(values: torch.Tensor) -> list[mpf]:
    return [mpf(v) for v in values.tolist()]


def pairs_of(policy: PairLogps, reference: PairLogps, rewards: PairRewards) -> list[Pair]:
    result = []
    assert policy.tokens is not None
    assert reference.tokens is not None
    assert policy.tokens.log_collisions is not None
    for i in range(len(policy.chosen)):
        at = [policy.tokens.segment == s for s in (2 * i, 2 * i + 1)]
        result.append(
            Pair(
                (mpf(policy.chosen[i].item()), mpf(policy.rejected[i].item())),
                (mpf(reference.chosen[i].item()), mpf(reference.rejected[i].item())),
                (int(policy.chosen_lengths[i]), int(policy.rejected_lengths[i])),
                (mpf(rewards.chosen[i].item()), mpf(rewards.rejected[i].item())),
                tuple(numbers(policy.tokens.logps[where]) for where in at),  # type: ignore[arg-type]
                tuple(numbers(reference.tokens.logps[where]) for where in at),  # type: ignore[arg-type]
                tuple(numbers(policy.tokens.log_collisions[where]) for where in at),  # type: ignore[arg-type]
            )
        )
    return result


def compare(loss: Any, formula: Callable[[Pair], mpf], policy: PairLogps, reference: PairLogps, tight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    low = 1 + torch.randint(0, 9, (len(policy.chosen),), generator=generator).double() / 2
    rewards = PairRewards(low + 0.5 * torch.randint(1, 9, (len(low),), generator=generator), low)
    values = call(loss.eval(), policy, reference, rewards)
    for value, pair in zip(values.tolist(), pairs_of(policy, reference, rewards), strict=True):
        assert value == pytest.approx(float(formula(pair)), rel=tight, abs=tight)


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=[str(loss).replace("\n", "") for loss, _ in FORMULAS])
def test_values_equal_the_papers_formula(loss: Any, formula: Callable[[Pair], mpf]) -> None:
    policy = random_logps(40, seed=11)
    reference = random_logps(40, seed=12, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    compare(loss, formula, policy, reference, 1e-11)


# below this log-ratio e^-a exceeds e^30, where these go on as a tangent instead (their docstrings say so)
TANGENT = {ForwardKLDPO, AlphaDPO, AlphaPO}


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=[str(loss).replace("\n", "") for loss, _ in FORMULAS])
def test_hand_picked_and_extreme_values_equal_the_papers_formula(loss: Any, formula: Callable[[Pair], mpf]) -> None:
    reach = 25.0 if type(loss) in TANGENT else 1e4
    sides = torch.tensor([-2 * reach, -reach, 1 - reach, -1e-3], dtype=torch.float64)
    chosen, rejected = torch.cartesian_prod(sides, sides).unbind(1)
    policy, reference = logps(chosen, rejected, (2, 3)), logps([-reach] * 16, [-reach] * 16, (2, 3))
    if isinstance(loss, WPO):  # weights that no real response has would only test the digits of exp
        policy = replace(policy, tokens=random_logps(16, 13, (torch.full((16,), 2), torch.full((16,), 3))).tokens)
    with mpmath.workdps(2700):  # σ(-6000) is 1e-2606, and 1 - σ(6000) must still be told from 0
        compare(loss, formula, policy, reference, 1e-10)


def by_order(loss: float, values: list[tuple[mpf, mpf]]) -> list[mpf]:
    """For each pair its -log σ(β (i-th smallest of the first - i-th smallest of the second)), i its rank."""
    first, second = (sorted(column) for column in zip(*values, strict=True))
    return [-log(sigma(mpf(loss) * (v - second[first.index(v)]))) for v, _ in values]


def test_aot_sorts_margins_and_aot_unpaired_sorts_log_ratios() -> None:
    policy = random_logps(9, seed=14)
    reference = random_logps(9, seed=15, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    rewards = PairRewards(torch.ones(9), torch.zeros(9))
    pairs = pairs_of(policy, reference, rewards)
    wanted = by_order(0.3, [(p.policy[0] - p.policy[1], p.reference[0] - p.reference[1]) for p in pairs])
    torch.testing.assert_close(call(AOT(0.3), policy, reference), torch.tensor([float(v) for v in wanted]).double())
    wanted = by_order(0.3, [(p.a, p.b) for p in pairs])
    torch.testing.assert_close(
        call(AOTUnpaired(0.3), policy, reference), torch.tensor([float(v) for v in wanted]).double()
    )


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_kto_holds_responses_against_the_mean_of_unrelated_ones(shift: float) -> None:
    policy = random_logps(5, seed=16)
    reference = random_logps(5, seed=17, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    assert policy.unrelated is not None
    assert reference.unrelated is not None
    policy = replace(policy, unrelated=policy.unrelated + shift)
    assert policy.unrelated is not None
    z = max(mpf(0), sum(numbers(policy.unrelated - reference.unrelated)) / 10)
    assert (z == 0) is (shift < 0), "both sides of the clamp"
    values = call(KTO(0.3, 1.2, 0.7), policy, reference)
    rewards = PairRewards(torch.ones(5), torch.zeros(5))
    for value, p in zip(values.tolist(), pairs_of(policy, reference, rewards), strict=True):
        good = mpf(1.2) * (1 - sigma(mpf(0.3) * (p.a - z)))
        bad = mpf(0.7) * (1 - sigma(mpf(0.3) * (z - p.b)))
        assert value == pytest.approx(float(good + bad), rel=1e-11)


def test_f_dpo_tends_to_dpo_and_to_the_forward_kl() -> None:
    policy = random_logps(5, seed=18)
    reference = random_logps(5, seed=19, lengths=(policy.chosen_lengths, policy.rejected_lengths))
    torch.testing.assert_close(
        AlphaDPO(0.3, 1e-9)(policy, reference), DPO(0.3)(policy, reference), rtol=1e-6, atol=1e-6
    )
    near = AlphaDPO(0.3, 1 - 1e-9)(policy, reference)
    torch.testing.assert_close(near, ForwardKLDPO(0.3)(policy, reference), rtol=1e-6, atol=1e-6)


def test_soft_labels_have_the_gradients_of_the_backward_kl() -> None:
    m = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    gap = torch.full((7,), 1.5, dtype=torch.float64)
    soft = torch.autograd.grad(SoftLabelDPO(0.3, temperature=2.0).compare(m, gap).sum(), m)
    divergence = torch.autograd.grad(RPOBackwardKL(0.3, eta=0.5).compare(m, gap).sum(), m)
    torch.testing.assert_close(soft, divergence)
