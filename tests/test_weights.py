"""The weight of the rejected-goal half: an exact weighted mean over the step, whatever the batches; logs stay plain."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, make_trainer, sgd
from rap_lightning.batches.sampler import StepSampler
from rap_lightning.errors import ConfigError
from rap_lightning.losses import AOT, BCO, DPO, KTO, SimPO
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.training.schedules import ConstantWithWarmup
from test_fit import assert_same, logged, weights

PAIRS = 23  # of pairs_folder's training split; none of them ties


def one_step(folder: Path, model: Path, data: Path, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"loss": SimPO(), "batch_size": 2 * PAIRS, "optimizer": sgd, "schedule": ConstantWithWarmup()} | options
    module, datamodule = build(model, data, **options)
    make_trainer(folder, **({"max_steps": 1} | (trainer or {}))).fit(module, datamodule)
    return module


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_a_step_is_the_weighted_mean_of_the_two_halves_own_steps(
    weight: float, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from rap_lightning.models.policy_config import PolicyConfig

    start = {n: p.detach() for n, p in PolicyConfig(str(tiny)).build(torch.float32).named_parameters()}
    chosen, rejected = (
        weights(one_step(tmp_path / half, tiny, pairs_folder, {"gradient_clip_val": None}, relabel=half))
        for half in ("chosen", "rejected")
    )
    share = weight / (1 + weight)
    expected = {n: start[n] + (1 - share) * (chosen[n] - start[n]) + share * (rejected[n] - start[n]) for n in start}
    for name, more in (("whole", {}), ("parts", {"batch_size": 10}), ("stream", {"batch_size": 10, "streaming": True})):
        trainer = {"gradient_clip_val": None, "accumulate_grad_batches": 1 if name == "whole" else 5}
        done = one_step(tmp_path / name, tiny, pairs_folder, trainer, rejected_weight=weight, **more)
        assert_same(weights(done), expected, 2e-6)


def test_the_best_goals_half_weighs_in_the_step_as_its_own_step_says(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """Σ w ℓ / Σ w, from the steps of the two parts alone; the pairs whose winner has the best goal count once."""
    from rap_lightning.models.policy_config import PolicyConfig

    start = {n: p.detach() for n, p in PolicyConfig(str(tiny)).build(torch.float32).named_parameters()}

    def moved(name: str, **options: Any) -> tuple[dict[str, Any], int]:
        module = one_step(tmp_path / name, tiny, pairs_folder, {"gradient_clip_val": None}, batch_size=100, **options)
        (report,) = module.trainer.datamodule.reports["train"]
        return {n: p - start[n] for n, p in weights(module).items()}, report.relabelled

    both, pairs = moved("both")
    plus, all_pairs = moved("plus", best_goal=True)
    weight, best = 0.25, all_pairs - pairs
    assert 0 < best < pairs / 2, "some of the pairs' winners have the best goal already"
    of_best = {n: (all_pairs * plus[n] - pairs * both[n]) / best for n in start}
    expected = {
        n: start[n] + (pairs * both[n] + weight * best * of_best[n]) / (pairs + weight * best) for n in start
    }  # fmt: skip
    for name, more in (("whole", {}), ("parts", {"batch_size": 10}), ("stream", {"batch_size": 10, "streaming": True})):
        trainer = {"gradient_clip_val": None, "accumulate_grad_batches": 1 if name == "whole" else 7}
        options = {"batch_size": 100, "best_goal": True, "best_goal_weight": weight} | more
        assert_same(weights(one_step(tmp_path / name, tiny, pairs_folder, trainer, **options)), expected, 2e-6)


def test_logged_means_are_of_pairs_and_know_no_weights(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    for name, weight in (("plain", 1.0), ("weighed", 0.2)):
        one_step(tmp_path / name, tiny, pairs_folder, rejected_weight=weight)
    plain, weighed = (logged(tmp_path / name)[0] for name in ("plain", "weighed"))
    same = [n for n in plain if n.partition("/")[0] in ("loss", "logps", "rewards", "lengths", "pairs", "tokens")]
    assert len(same) > 20
    assert {n: weighed[n] for n in same} == {n: plain[n] for n in same}
    assert plain["loss/chosen-goal"] != pytest.approx(plain["loss/rejected-goal"]), "or the halves could not be told"
    assert weighed["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_knows_the_weight_of_the_whole_step(world: int) -> None:
    weigh = lambda number: 1.0 if number % 2 == 0 else 0.3  # noqa: E731
    steps: dict[int, list[float]] = {}
    for rank in range(world):
        sampler = StepSampler(
            37, 3, accumulate=2, num_replicas=world, rank=rank, shuffle=True, seed=1, weigh=weigh
        )  # fmt: skip
        for number, plan in enumerate(sampler):
            told = steps.setdefault(number // 2, [plan.step_weight, 0.0])
            assert told[0] == plan.step_weight
            told[1] += sum(plan.loss_weights)
            for index, weight, counts in zip(plan.indices, plan.loss_weights, plan.weights, strict=True):
                assert weight == counts * weigh(index)
            assert [w for part in plan.parts for w in plan.part(part).loss_weights] == list(plan.loss_weights)
    assert all(math.isclose(told, held) for told, held in steps.values())
    assert math.isclose(sum(told for told, _ in steps.values()), 19 + 18 * 0.3)


@pytest.mark.parametrize("loss", [DPO(), BCO()])
def test_losses_of_single_pairs_take_it(loss: Any, tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    one_step(tmp_path, tiny, pairs_folder, loss=loss, rejected_weight=0.5)
    assert logged(tmp_path)[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "options",
    [{"rejected_weight": 0.5}, {"best_goal": True, "best_goal_weight": 0.5}, {"weight_column": "score_chosen"}],
)
@pytest.mark.parametrize("loss", [KTO(), AOT()])
def test_losses_of_whole_batches_refuse_it(
    loss: Any, options: dict[str, Any], tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    name, weight = list(options.items())[-1]
    with pytest.raises(ConfigError, match=f"{name} {weight} weights single pairs, and {type(loss).__name__}"):
        one_step(tmp_path, tiny, pairs_folder, loss=loss, **options)


@pytest.mark.parametrize(
    ("relabelling", "given", "message"),
    [
        (Relabelling("both"), {"rejected": 0.0}, "that is relabel chosen"),
        (Relabelling("both"), {"rejected": -1.0}, "rejected_weight must be above 0 and finite"),
        (Relabelling("both"), {"rejected": math.nan}, "above 0 and finite"),
        (Relabelling("both"), {"rejected": math.inf}, "above 0 and finite"),
        (Relabelling("none"), {"rejected": 0.5}, "no effect with relabel none"),
        (Relabelling("chosen"), {"rejected": 0.5}, "no effect with relabel chosen"),
        (Relabelling("rejected"), {"rejected": 0.5}, "no effect with relabel rejected"),
        (Relabelling(best_goal=True), {"best": 0.0}, "that is best_goal false"),
        (Relabelling(best_goal=True), {"best": -1.0}, "best_goal_weight must be above 0 and finite"),
        (Relabelling(best_goal=True), {"best": math.nan}, "above 0 and finite"),
        (Relabelling(best_goal=True), {"best": math.inf}, "above 0 and finite"),
        (Relabelling(), {"best": 0.5}, r"best_goal_weight 0.5 has no effect (?s:.*)best_goal true"),
    ],
)
def test_weights_that_mean_nothing_are_refused_in_words(
    relabelling: Relabelling, given: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        relabelling.weights(**given)


def test_originals_and_ties_count_one() -> None:
    assert Relabelling("both", keep_original=True).weights(0.5) == (1.0, 0.5, 1.0, 1.0, 1.0, 0.5)
    assert Relabelling("rejected", keep_original=True).weights(0.5) == (1.0, 0.5, 1.0, 1.0, 1.0, 0.5)
    assert Relabelling("half").weights(0.5) == (1.0, 0.5, 1.0, 1.0, 1.0, 0.5)
    assert Relabelling("both", best_goal=True).weights(0.5, 0.25) == (1.0, 0.5, 1.0, 0.25, 1.0, 0.5)
    assert Relabelling("chosen", best_goal=True).weights(best=2.0) == (1.0, 1.0, 1.0, 2.0, 1.0, 1.0)
