"""What each layout writes down, number by number, of two small training pairs."""

import hashlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from rap_lightning.batches import layouts
from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS, Collate, build_prefix_tree, lay_out, lay_out_responses
from rap_lightning.batches.sampler import BatchPlan, PairSize

FIRST = Example("one", 0, "9", (9.0, 2.5), [1, 2, 3], [4, 5], [6])
SECOND = Example("two", 2, None, (7.0, 4.0), [1, 2], [7], [3, 8, 9])
PLAN = BatchPlan((5, 3), (1.0, 0.0), 7, ((0, 1),), (0.5, 0.0), 3.25)
PAD = 99


def batch_of(layout: str) -> Any:
    return lay_out(LAYOUTS[layout], [FIRST, SECOND], PLAN, PAD)


def assert_ints(found: torch.Tensor, expected: Any) -> None:
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_padded_rows_stand_on_the_left_and_padding_is_hidden() -> None:
    batch = batch_of("padded")
    assert_ints(batch.input_ids, [[1, 2, 3, 4, 5], [1, 2, 3, 6, PAD], [1, 2, 7, PAD, PAD], [1, 2, 3, 8, 9]])
    assert_ints(batch.attention_mask, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert_ints(batch.position_ids, [[0, 1, 2, 3, 4]] * 4)
    assert batch.position_ids.is_contiguous()
    assert batch.forest is None
    assert_ints(batch.predict_from, [2, 3, 7, 11, 16, 17, 18])


def test_packed_responses_stand_in_one_row_each_after_its_prompt() -> None:
    batch = batch_of("packed")
    assert_ints(batch.input_ids, [[1, 2, 3, 4, 5, 1, 2, 3, 6, 1, 2, 7, 1, 2, 3, 8, 9]])
    assert_ints(batch.position_ids, [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    assert_ints(batch.attention_mask, [[1] * 17])
    assert_ints(batch.predict_from, [2, 3, 7, 10, 13, 14, 15])
    assert_ints(batch.forest.end, [5] * 5 + [9] * 4 + [12] * 3 + [17] * 5)
    assert batch.forest.runs == ((0, 5, 5), (5, 9, 9), (9, 12, 12), (12, 17, 17))
    assert batch.forest.paths == (((0, 5),), ((5, 9),), ((9, 12),), ((12, 17),))


def test_a_tree_holds_what_sequences_begin_with_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "WORTH_SHARING", 1)
    batch = batch_of("tree")
    # in lexicographic order: 1 2 3 (4 5 | 6 | 8 9) | 7 after 1 2
    assert_ints(batch.input_ids, [[1, 2, 3, 4, 5, 6, 8, 9, 7]])
    assert_ints(batch.position_ids, [[0, 1, 2, 3, 4, 3, 3, 4, 2]])
    assert_ints(batch.attention_mask, [[1] * 9])
    assert_ints(batch.predict_from, [2, 3, 2, 1, 1, 2, 6])
    assert_ints(batch.forest.end, [9, 9, 8, 5, 5, 6, 8, 8, 9])
    assert batch.forest.runs == ((0, 2, 9), (2, 3, 8), (3, 5, 5), (5, 6, 6), (6, 8, 8), (8, 9, 9))
    assert batch.forest.paths == (((0, 5),), ((0, 3), (5, 6)), ((0, 3), (6, 8)), ((0, 2), (8, 9)))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_what_belongs_to_pairs_is_the_same_in_every_layout(layout: str) -> None:
    batch = batch_of(layout)
    assert_ints(batch.target, [4, 5, 6, 7, 3, 8, 9])
    assert_ints(batch.segment, [0, 0, 1, 2, 3, 3, 3])
    assert_ints(batch.lengths, [2, 1, 1, 3])
    assert_ints(batch.origin, [0, 2])
    for found, expected in (
        (batch.rewards, [[9.0, 2.5], [7.0, 4.0]]), (batch.weights, [1.0, 0.0]), (batch.loss_weights, [0.5, 0.0]),
    ):  # fmt: skip
        assert found.dtype == torch.float32
        assert found.tolist() == expected
    assert (batch.step_pairs, batch.step_weight) == (7, 3.25)
    assert (batch.pair_ids, batch.goals) == (("one", "two"), ("9", None))
    # stored log-probabilities are found by these: they may not change from version to version
    sequences = [(3, [1, 2, 3, 4, 5]), (3, [1, 2, 3, 6]), (2, [1, 2, 7]), (2, [1, 2, 3, 8, 9])]
    assert batch.digests == tuple(
        hashlib.sha256(b"%d:" % prompt + np.array(ids, np.int64).tobytes()).digest()[:16] for prompt, ids in sequences
    )


def test_numbers_of_pairs_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)  # as Lightning sets it for precision bf16-true
    try:
        batch = batch_of("packed")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in (batch.rewards, batch.weights, batch.loss_weights)} == {torch.float32}


def test_one_text_cut_into_prompt_and_response_elsewhere_is_another_response() -> None:
    cut = [Example("x", 0, None, (2.0, 1.0), [1, 2, 3][:n], [1, 2, 3, 4][n:], [5]) for n in (1, 2)]
    batch = lay_out(LAYOUTS["padded"], cut, BatchPlan((0, 1), (1.0, 1.0), 2, ((0, 1),)), 0)
    assert batch.input_ids[0].tolist() == batch.input_ids[2].tolist()
    assert len(set(batch.digests)) == 4
    assert {len(digest) for digest in batch.digests} == {16}


def test_single_responses_are_padded_and_no_pairs() -> None:
    batch = lay_out_responses([([1, 2], [3]), ([4], [5, 6, 7])], PAD)
    assert_ints(batch.input_ids, [[1, 2, 3, PAD], [4, 5, 6, 7]])
    assert_ints(batch.attention_mask, [[1, 1, 1, 0], [1, 1, 1, 1]])
    assert_ints(batch.predict_from, [1, 4, 5, 6])
    assert_ints(batch.target, [3, 5, 6, 7])
    assert_ints(batch.segment, [0, 1, 1, 1])
    assert_ints(batch.lengths, [1, 3])
    for nothing in (batch.rewards, batch.origin, batch.weights, batch.loss_weights):
        assert nothing.shape == (0,)
    assert (batch.step_pairs, batch.step_weight) == (0, 0.0)
    assert (batch.digests, batch.pair_ids, batch.goals) == ((), (), ())
    assert len(batch) == 0


def test_estimates_are_rows_by_the_longest_prompts_twice_and_prompts_once() -> None:
    sizes = [PairSize(10, 3, 5), PairSize(4, 9, 1), PairSize(2, 1, 1)]
    assert LAYOUTS["padded"].tokens(sizes) == 2 * 3 * 15
    assert LAYOUTS["padded"].tokens([PairSize(1, 9, 2)]) == 2 * 10
    assert LAYOUTS["packed"].tokens(sizes) == 28 + 18 + 6
    assert LAYOUTS["tree"].tokens(sizes) == 18 + 14 + 4


def test_a_planned_batch_becomes_its_forward_passes_also_in_a_worker_that_is_not_forked() -> None:
    third = Example("three", 1, "2", (1.0, 2.0), [5], [6], [7])
    plan = BatchPlan((8, 4, 6), (1.0, 1.0, 0.0), 11, ((2, 0), (1,)), (1.0, 0.3, 0.0), 4.5)
    collate = Collate("padded", PAD)
    for given in (collate, pickle.loads(pickle.dumps(collate))):
        passes = given((plan, [FIRST, SECOND, third]))
        assert [batch.pair_ids for batch in passes] == [("three", "one"), ("two",)]
        assert [batch.weights.tolist() for batch in passes] == [[0.0, 1.0], [1.0]]
        assert [[round(w, 6) for w in batch.loss_weights.tolist()] for batch in passes] == [[0.0, 1.0], [0.3]]
        assert {(batch.step_pairs, batch.step_weight) for batch in passes} == {(11, 4.5)}
        assert_ints(passes[0].input_ids[1], [7 - 2, 7, PAD, PAD, PAD])
        assert passes[0].forest is None


# -- the forest -------------------------------------------------------------------------------------------------------


def ids_of(*sequences: list[int]) -> list[Any]:
    return [np.array(ids, np.int64) for ids in sequences]


def test_each_sequence_is_found_where_it_stands_whatever_the_order() -> None:
    given = ids_of([3, 1], [1, 2], [3, 1, 4], [1, 2])
    for shared in (False, True):
        tree = build_prefix_tree(given, shared=shared)
        assert [tree.input_ids[0, places].tolist() for places in tree.places] == [s.tolist() for s in given]
        assert tree.input_ids.dtype == tree.position_ids.dtype == torch.int64
    apart = build_prefix_tree(given, shared=False)
    assert apart.input_ids[0].tolist() == [3, 1, 1, 2, 3, 1, 4, 1, 2], "in the order given"
    assert apart.forest.end.tolist() == [2, 2, 4, 4, 7, 7, 7, 9, 9]


@pytest.mark.parametrize(("common", "tokens"), [(15, 2 * 16), (16, 16 + 2)])
def test_sixteen_common_tokens_are_worth_sharing_and_fifteen_are_not(common: int, tokens: int) -> None:
    head = [7] * common
    assert len(build_prefix_tree(ids_of([*head, 1], [*head, 2]), shared=True).input_ids[0]) == tokens


def test_equal_sequences_stand_once_however_short_and_short_beginnings_are_not_shared() -> None:
    equal = build_prefix_tree(ids_of([5, 6], [5, 6]), shared=True)
    assert equal.input_ids[0].tolist() == [5, 6]
    assert [p.tolist() for p in equal.places] == [[0, 1], [0, 1]]
    assert equal.forest.paths == (((0, 2),),)
    assert build_prefix_tree(ids_of([5, 6, 7], [5, 6]), shared=True).input_ids[0].tolist() == [5, 6, 5, 6, 7]


def test_branches_are_left_and_come_back_to() -> None:
    """Three depths: what shares with the path, what shares with an earlier branch of it, and what starts anew."""
    a, b, c = [1] * 16, [2] * 16, [3] * 16
    given = ids_of([*a, *b, *c, 9], [*a, *b, *c, 8], [*a, *b, 7], [*a, 6], [5, 5])
    tree = build_prefix_tree(given, shared=True)
    assert tree.input_ids.numel() == 48 + 2 + 1 + 1 + 2
    assert [tree.input_ids[0, p].tolist() for p in tree.places] == [s.tolist() for s in given]
    assert [tree.position_ids[0, p].tolist() for p in tree.places] == [list(range(len(s))) for s in given]
    end, index = tree.forest.end, torch.arange(tree.input_ids.numel())
    sees = (index <= index[:, None]) & (index[:, None] < end)
    for places in tree.places:
        for depth, place in enumerate(places):
            assert sees[place].nonzero()[:, 0].tolist() == places[: depth + 1].tolist()
    assert tree.forest.roots == [(0, 52), (52, 54)]
