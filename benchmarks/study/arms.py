"""The arms: what each is trained on, with which loss, and the settings that are tried for it, four for each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.fitting import Recipe
from benchmarks.study.worlds import derived, good_winners, never_swapped

from rap_lightning.losses import (
    DPO,
    IPO,
    ODPO,
    SFT,
    APOZero,
    DPOPositive,
    MarginDPO,
    Mixture,
    PreferenceLoss,
    SimPO,
    SoftLabelDPO,
)
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal
from rap_lightning.preferences.scales import QuantileScale
from rap_lightning.training.warm_up import WarmUp

Trial = dict[str, float]
"""One setting: ``lr``, ``beta``, or what stands in for it."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: for tables.
        trials: the settings that are tried, all with the same number of steps.
        recipe: of (world's folder, trial, optimizer steps).
        asks: what its figure of merit is sampled under: no goal, or the best one.
        steps: times the steps of the others.
        needs: an arm whose policy of the same world this one needs (IRA).
        template: how its prompts are written when it is asked.
    """

    title: str
    trials: tuple[Trial, ...]
    recipe: Callable[[Path, Trial, int], Recipe]
    asks: str = "best"
    steps: float = 1.0
    needs: str | None = None
    template: Callable[[], GoalTemplate] = OverallGoal


def grid(lrs: tuple[float, ...], others: tuple[float, ...], name: str = "beta", **fixed: float) -> tuple[Trial, ...]:
    """All combinations of learning rates and values of one option."""
    return tuple({"lr": lr, name: other, **fixed} for lr in lrs for other in others)


#: Preference losses of the margin.
USUAL = grid((3e-4, 1e-3), (0.1, 0.5))
#: Of ways that have a strength of their own: two values of it, each at two learning rates.
RATES, BETA = (3e-4, 1e-3), 0.5


def plain(loss: Callable[[Trial], PreferenceLoss], make: Callable[[Path], Path] | None = None) -> Callable[..., Recipe]:
    """Pairs without goals. The template is there for its rules alone: ties are dropped as in the other arms."""

    def recipe(folder: Path, trial: Trial, steps: int) -> Recipe:
        source = make(folder) if make else folder / "train.jsonl"
        return Recipe(source, loss(trial), trial["lr"], steps, OverallGoal(), {"relabel": "none"})

    return recipe


def relabelled(
    loss: Callable[[Trial], PreferenceLoss],
    data: Callable[[Trial], dict[str, Any]] = lambda trial: {},
    template: Callable[[], GoalTemplate] = OverallGoal,
    warm_up: Callable[[Trial, int], WarmUp | None] = lambda trial, steps: None,
) -> Callable[..., Recipe]:
    """Goal-conditioned pairs, as the data module makes them."""

    def recipe(folder: Path, trial: Trial, steps: int) -> Recipe:
        source = folder / "train.jsonl"
        return Recipe(source, loss(trial), trial["lr"], steps, template(), data(trial), warm_up(trial, steps))

    return recipe


def dpo(trial: Trial) -> PreferenceLoss:
    """DPO at the trial's β."""
    return DPO(trial.get("beta", BETA))


def _good(folder: Path) -> Path:
    return derived(folder, "good-winners", good_winners)


def _unswapped(folder: Path, trial: Trial, steps: int) -> Recipe:
    return Recipe(derived(folder, "never-swapped", never_swapped), dpo(trial), trial["lr"], steps)


def _ira(folder: Path, trial: Trial, steps: int) -> Recipe:
    # benchmarks/study/jobs.py writes the file with the DPO policy of the same world
    return Recipe(folder / "implicit-rewards.jsonl", dpo(trial), trial["lr"], steps, implicit_scale())


def implicit_scale() -> GoalTemplate:
    """Goals that state how an implicit reward ranks among those of the training data."""
    return OverallGoal(QuantileScale())


def attribute_goal() -> GoalTemplate:
    """The rule's four attributes and the overall score."""
    return AttributeGoal(["topic", "distinct", "count", "order"])


def mixed(trial: Trial) -> PreferenceLoss:
    """DPO, and imitation of chosen under its own goal."""
    return Mixture([dpo(trial), SFT()], [1.0, trial["sft"]])


def _warm(trial: Trial, steps: int) -> WarmUp:
    return WarmUp(max(1, round(trial["share"] * steps)), lr=1e-3)


ARMS: dict[str, Arm] = {
    # the paper's comparison
    "dpo": Arm("DPO", USUAL, plain(dpo), "none"),
    "ra": Arm("RA (both goals)", USUAL, relabelled(dpo)),
    "half": Arm("Half-RA", USUAL, relabelled(dpo, lambda trial: {"relabel": "half"})),
    "dpo-2x": Arm("DPO, twice the steps", USUAL, plain(dpo), "none", steps=2),
    "ra-2x": Arm("RA, twice the steps", USUAL, relabelled(dpo), steps=2),
    "good": Arm("DPO, pairs with a good winner", USUAL, plain(dpo, _good), "none"),
    "sft": Arm(
        "score-conditioned SFT", tuple({"lr": lr} for lr in (3e-4, 1e-3, 2e-3, 4e-3)), relabelled(lambda t: SFT())
    ),
    "chosen": Arm("chosen half only", USUAL, relabelled(dpo, lambda trial: {"relabel": "chosen"})),
    "rejected": Arm("rejected half only", USUAL, relabelled(dpo, lambda trial: {"relabel": "rejected"})),
    "never-swapped": Arm("never swapped (the code's fault)", USUAL, _unswapped),
    # ways to make conditioning win
    "ra-sft": Arm(
        "RA + SFT", tuple({"lr": lr, "sft": w} for lr in RATES for w in (0.3, 2.0)), relabelled(mixed)
    ),
    "warm": Arm(
        "RA after a warm-up", tuple({"lr": lr, "share": s} for lr in RATES for s in (0.2, 0.5)),
        relabelled(dpo, warm_up=_warm),
    ),
    "weight": Arm(
        "RA, rejected goals count less", grid(RATES, (0.2, 0.5), "weight"),
        relabelled(dpo, lambda trial: {"rejected_weight": trial["weight"]}),
    ),
    "gap": Arm(
        "RA, only gaps of at least", grid(RATES, (2.0, 4.0), "gap"),
        relabelled(dpo, lambda trial: {"filters": Filters(min_gap=trial["gap"])}),
    ),
    "original": Arm("RA + the plain pairs", USUAL, relabelled(dpo, lambda trial: {"keep_original": True})),
    "positive": Arm(
        "RA, DPOPositive", grid(RATES, (1.0, 5.0), "penalty"), relabelled(lambda t: DPOPositive(BETA, t["penalty"]))
    ),
    "apo": Arm("RA, APOZero", USUAL, relabelled(lambda t: APOZero(t["beta"]))),
    # other losses
    "ra-ipo": Arm("RA, IPO", grid(RATES, (0.1, 0.5)), relabelled(lambda t: IPO(t["beta"]))),
    "ra-simpo": Arm("RA, SimPO", grid(RATES, (2.0, 8.0)), relabelled(lambda t: SimPO(t["beta"], 0.5))),
    "ra-soft": Arm("RA, SoftLabelDPO", USUAL, relabelled(lambda t: SoftLabelDPO(t["beta"], temperature=2.0))),
    "odpo": Arm("ODPO", USUAL, plain(lambda t: ODPO(t["beta"])), "none"),
    "margin": Arm("margin DPO", USUAL, plain(lambda t: MarginDPO(t["beta"], 0.2)), "none"),
    "ira": Arm("IRA (implicit rewards)", USUAL, _ira, needs="dpo", template=implicit_scale),
    "attributes": Arm(
        "RA, attribute goals", USUAL, relabelled(dpo, template=attribute_goal), template=attribute_goal
    ),
}  # fmt: skip
#: Ways that change RA and go together; the best combination is made of the two that did best in tuning.
WAYS = ("ra-sft", "warm", "weight", "gap", "original")
#: In all of these the best figure is read from what tuning chose.
HEADLINE = ("dpo", "ra", "half", "dpo-2x", "ra-2x", "good", "sft", "chosen", "rejected", "never-swapped")
#: The arms whose setting is chosen anew in more worlds, to see what hangs on that: first these, for the dose-response,
CHECKED = ("dpo", "ra", "dpo-2x", "ra-2x", "ra-sft", "original")
#: and these as time allows.
CHECKED_LAST = ("weight", "combination", "half", "good", "never-swapped", "sft")
#: The third arm of the dose-response is the better of these in all tuning worlds.
DOSED = ("ra-sft", "original")
