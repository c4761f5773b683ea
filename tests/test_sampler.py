"""Every epoch is complete, deterministic, and the same however many ranks and batches share it."""

import random

import pytest

from rap_lightning.batches.layouts import LAYOUTS
from rap_lightning.batches.sampler import BatchPlan, Packing, PairSize, StepSampler
from rap_lightning.errors import ConfigError


def plans(
    size: int, world: int, batch_size: int = 3, accumulate: int = 2, epoch: int = 0, start: int = 0,
    packing: Packing | None = None,
) -> list[list[BatchPlan]]:  # fmt: skip
    ranks = []
    for rank in range(world):
        sampler = StepSampler(
            size, batch_size, accumulate=accumulate, num_replicas=world, rank=rank, shuffle=True, seed=3,
            packing=packing,
        )  # fmt: skip
        sampler.set_epoch(epoch)
        sampler.start = start
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) - start
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 12, 13, 17, 36, 37])
def test_an_epoch_holds_every_pair_once_and_every_rank_as_many_batches(size: int, world: int) -> None:
    ranks = plans(size, world)
    assert len({len(rank) for rank in ranks}) == 1
    seen = [i for rank in ranks for plan in rank for i, w in zip(plan.indices, plan.weights, strict=True) if w]
    assert sorted(seen) == list(range(size))
    # the pairs that a step says it has are those that its batches hold
    steps: dict[int, tuple[int, float]] = {}
    for rank in ranks:
        for number, plan in enumerate(rank):
            told, held = steps.get(number // 2, (plan.step_pairs, 0.0))
            assert told == plan.step_pairs
            steps[number // 2] = (told, held + sum(plan.weights))
    assert all(told == held for told, held in steps.values())


def test_the_steps_hold_the_same_pairs_for_any_number_of_ranks() -> None:
    def steps(world: int, batch_size: int, accumulate: int) -> list[set[int]]:
        ranks = plans(37, world, batch_size, accumulate)
        count = -(-len(ranks[0]) // accumulate)
        return [
            {
                i
                for rank in ranks
                for plan in rank[s * accumulate : (s + 1) * accumulate]
                for i, w in zip(plan.indices, plan.weights, strict=True)
                if w
            }
            for s in range(count)
        ]

    assert steps(1, 12, 1) == steps(2, 3, 2) == steps(3, 2, 2) == steps(1, 1, 12)


def test_epochs_differ_and_repeat_exactly() -> None:
    assert plans(20, 1, epoch=0) == plans(20, 1, epoch=0)
    assert plans(20, 1, epoch=0) != plans(20, 1, epoch=1)


def test_a_start_skips_batches_of_one_epoch_only() -> None:
    whole = plans(20, 2)
    assert plans(20, 2, start=2) == [rank[2:] for rank in whole]
    sampler = StepSampler(20, 3, shuffle=True)
    sampler.start = 4
    assert len(list(sampler)) == len(sampler) - 4
    assert len(list(sampler)) == len(sampler)


def packing(size: int, layout: str = "tree", budget: int = 1200, seed: int = 0) -> Packing:
    rng = random.Random(seed)
    sizes = [PairSize(rng.randint(20, 200), rng.randint(1, 500), rng.randint(1, 500)) for _ in range(size)]
    return Packing(sizes, LAYOUTS[layout].tokens, budget)


def packed_plans(pack: Packing, world: int, batch_size: int, accumulate: int, epoch: int = 0) -> list[list[BatchPlan]]:
    return plans(len(pack.sizes), world, batch_size, accumulate, epoch, packing=pack)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("world", "batch_size", "accumulate"), [(1, 6, 2), (2, 3, 2), (3, 4, 1)])
@pytest.mark.parametrize("size", [1, 5, 12, 37])
def test_packing_keeps_steps_whole_and_forward_passes_within_the_budget(
    layout: str, world: int, batch_size: int, accumulate: int, size: int
) -> None:
    pack = packing(size, layout, budget=2500)
    ranks = packed_plans(pack, world, batch_size, accumulate)
    seen = [i for rank in ranks for plan in rank for i, w in zip(plan.indices, plan.weights, strict=True) if w]
    assert sorted(seen) == list(range(size)), "every pair once"
    for at_once in zip(*ranks, strict=True):
        assert len({len(plan.parts) for plan in at_once}) == 1, "as many forward passes on every rank"
    for plan in (plan for rank in ranks for plan in rank):
        assert [i for part in plan.parts for i in part] == list(range(len(plan.indices)))
        for part in plan.parts:
            assert pack.tokens([pack.sizes[plan.indices[i]] for i in part]) <= pack.budget
            assert plan.part(part).indices == tuple(plan.indices[i] for i in part)
            assert plan.part(part).weights == tuple(plan.weights[i] for i in part)


def test_packing_leaves_to_each_step_the_pairs_it_has_without() -> None:
    def steps(ranks: list[list[BatchPlan]], accumulate: int) -> list[set[int]]:
        return [
            {i for rank in ranks for plan in rank[s : s + accumulate] for i in plan.indices}
            for s in range(0, len(ranks[0]), accumulate)
        ]

    pack = packing(36)
    assert steps(packed_plans(pack, 2, 3, 2), 2) == steps(plans(36, 2, 3, 2), 2)  # type: ignore[arg-type]
    assert steps(packed_plans(pack, 1, 4, 3), 3) == steps(packed_plans(pack, 3, 4, 1), 1)
    assert packed_plans(pack, 1, 4, 3, epoch=1) != packed_plans(pack, 1, 4, 3)
    assert packed_plans(pack, 1, 4, 3) == packed_plans(pack, 1, 4, 3)


def test_ranks_are_balanced_by_tokens_and_batches_hold_pairs_of_like_length() -> None:
    pack = packing(4 * 64)
    dealt = packed_plans(pack, 4, 8, 2)

    def tokens(plan: BatchPlan) -> int:
        return sum(pack.alone(i) for i in plan.indices)

    by_length = [max(map(tokens, at_once)) / (sum(map(tokens, at_once)) / 4) for at_once in zip(*dealt, strict=True)]
    in_order = [
        max(map(tokens, at_once)) / (sum(map(tokens, at_once)) / 4)
        for at_once in zip(*plans(256, 4, 8, 2), strict=True)
    ]
    assert max(by_length) < 1.03
    assert max(in_order) > 1.1, "or the test shows nothing"


def test_length_aware_batches_pad_less() -> None:
    pack = packing(128, "padded", budget=10**9)

    def laid(ranks: list[list[BatchPlan]]) -> int:
        return sum(pack.tokens([pack.sizes[i] for i in plan.indices]) for rank in ranks for plan in rank)

    assert laid(packed_plans(pack, 1, 4, 16)) < 0.9 * laid(plans(128, 1, 4, 16))  # type: ignore[arg-type]


def test_a_budget_that_the_longest_pair_exceeds_is_refused_with_what_it_takes() -> None:
    sizes = [PairSize(10, 5, 5), PairSize(100, 300, 50)]
    with pytest.raises(ConfigError, match=r"token_budget 400 is too small: the longest pair alone takes 450 tokens"):
        Packing(sizes, LAYOUTS["tree"].tokens, 400)
    Packing(sizes, LAYOUTS["tree"].tokens, 450)
