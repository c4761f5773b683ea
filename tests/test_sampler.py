"""Every epoch is complete, deterministic, and the same however many ranks and batches share it."""

import pytest

from rap_lightning.batches.sampler import StepSampler


def plans(
    size: int, world: int, batch_size: int = 3, accumulate: int = 2, epoch: int = 0, start: int = 0
) -> list[list]:
    ranks = []
    for rank in range(world):
        sampler = StepSampler(
            size, batch_size, accumulate=accumulate, num_replicas=world, rank=rank, shuffle=True, seed=3
        )
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
