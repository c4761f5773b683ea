"""Laws 1 and 2: under the loser's goal the responses change places; goals that print the same never make two halves."""

import copy
import json
import math
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from conftest import encode, make_tokenizer, pair_of, pairs_of, scored_rows
from rap_lightning.batches.dataset import encode_pairs
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal
from rap_lightning.preferences.pair_cache import stored_pairs
from rap_lightning.preferences.relabelling import (
    BEST_GOAL,
    ORIGIN_TABLE,
    ORIGINS,
    UNCONDITIONED,
    RelabelledView,
    Relabelling,
    TrainingIndex,
    is_tie,
    relabel,
)
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale
from rap_lightning.preferences.sources import Source


def test_the_view_swaps_under_the_rejected_goal_and_edits_nothing() -> None:
    rows = scored_rows(12)
    before = copy.deepcopy(rows)
    pairs = [pair_of(row) for row in rows]
    view = RelabelledView(pairs, OverallGoal())
    assert len(view) == 24
    for i, row in enumerate(rows):
        high, low = view[2 * i], view[2 * i + 1]
        assert (high.origin, low.origin) == ("chosen-goal", "rejected-goal")
        assert (high.chosen, high.rejected) == (row["chosen"][-1]["content"], row["rejected"][-1]["content"])
        assert (low.chosen, low.rejected) == (high.rejected, high.chosen)
        assert high.rewards == (row["score_chosen"], row["score_rejected"])
        assert low.rewards == (row["score_rejected"], row["score_chosen"])
        assert (float(high.goal or 0), float(low.goal or 0)) == high.rewards
        assert high.pair_id == low.pair_id
        assert high.history == low.history == tuple(row["chosen"][:-1])
    assert rows == before
    assert view[-1] == view[23]
    with pytest.raises(IndexError):
        view[24]


def test_the_encoded_halves_swap_with_and_without_a_system_role(family: str) -> None:
    rows = scored_rows(10)
    pairs, _, encoder = encode(make_tokenizer(family), rows)
    decode = encoder.tokenizer.decode
    assert len(pairs) == 20
    for i, row in enumerate(rows):
        high, low = pairs.example(2 * i), pairs.example(2 * i + 1)
        win, lose = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        assert decode(high.chosen_ids).startswith(win)
        assert decode(high.rejected_ids).startswith(lose)
        assert (low.chosen_ids, low.rejected_ids) == (high.rejected_ids, high.chosen_ids)
        assert f"Overall score: {row['score_chosen']:g}." in decode(high.prompt_ids)
        assert f"Overall score: {row['score_rejected']:g}." in decode(low.prompt_ids)
        assert (high.origin, low.origin) == (0, 1)


def test_without_a_goal_the_pairs_stay_plain_and_carry_no_goal_text(family: str) -> None:
    rows = scored_rows(6)
    pairs, _, encoder = encode(make_tokenizer(family), rows, goal=None)
    assert len(pairs) == 6
    assert {pairs.example(i).origin for i in range(6)} == {2}
    assert not any("score" in encoder.tokenizer.decode(pairs.example(i).prompt_ids) for i in range(6))


def test_goals_that_print_the_same_are_dropped_and_counted(family: str) -> None:
    rows = scored_rows(6)
    rows[1]["score_chosen"] = rows[1]["score_rejected"] = 7.0
    rows[4]["score_chosen"], rows[4]["score_rejected"] = 7.04, 6.96  # both print "7"
    pairs, report, _ = encode(make_tokenizer(family), rows)
    assert (report.read, report.pairs, report.relabelled, len(pairs)) == (6, 4, 8, 8)
    ties = {reason: tally for reason, tally in report.dropped.items() if "tie" in reason}
    assert sum(tally.count for tally in ties.values()) == 2
    columns = "column score_chosen, score_rejected"
    places = {f"rows.jsonl line 2, {columns}", f"rows.jsonl line 5, {columns}"}
    assert {tally.first for tally in ties.values()} == places
    (tie,), _ = pairs_of([rows[4]], ties="chosen")
    view = RelabelledView([tie], OverallGoal())
    assert [half.origin for half in view] == ["chosen-goal"], "the other half would contradict it"
    with pytest.raises(ValueError, match="tie"):
        RelabelledView([replace(tie, tie=False)], OverallGoal())[1]


def test_scores_the_wrong_way_round_are_exchanged_and_counted() -> None:
    rows = scored_rows(3)
    rows[0]["score_chosen"], rows[0]["score_rejected"] = 2.0, 9.0
    pairs, report, encoder = encode(make_tokenizer("chatml"), rows)
    assert sum(t.count for r, t in report.repaired.items() if "exchanged" in r) == 1
    example = pairs.example(0)
    assert example.rewards == (9.0, 2.0)
    assert encoder.tokenizer.decode(example.chosen_ids).startswith(rows[0]["rejected"][-1]["content"])


def test_scores_outside_the_declared_scale_stop_with_the_rows() -> None:
    rows = scored_rows(4)
    rows[2]["score_chosen"] = 55.0
    with pytest.raises(DataError, match=r"line 3, column score_chosen, found 55(?s:.*)from 1 to 10"):
        encode(make_tokenizer("chatml"), rows)
    _, report, _ = encode(make_tokenizer("chatml"), rows, goal=OverallGoal(RewardScale(0, 100)))
    assert report.pairs == 4


def mend(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    row = json.loads(json.dumps(row))  # no shared parts
    *parents, last = path.split(".")
    target: Any = row
    for key in parents:
        target = target[int(key) if key.lstrip("-").isdigit() else key]
    target[last] = value
    return row


@pytest.mark.parametrize(
    ("path", "value", "column", "reason"),
    [
        ("prompt", " ", "prompt", "empty prompt"),
        ("chosen", [], "chosen", "empty conversation"),
        ("chosen.-1.content", None, "chosen[1].content", "null"),
        ("chosen.-1.content", "  ", "chosen[1].content", "empty response"),
        ("chosen.-1.content", "\u200b\u200d", "chosen[1].content", "empty response"),
        ("chosen.-1.content", "a \ud800", "chosen[1].content", "surrogate"),
        ("chosen.0.role", None, "chosen[0].role", "none of system, user"),
        ("rejected.-1.role", "user", "rejected[1]", "out of order"),
        ("rejected.0.content", "another question", "chosen[0], rejected[0]", "different conversations"),
        ("score_chosen", None, "score_chosen", "null or empty"),
        ("score_chosen", "", "score_chosen", "null or empty"),
        ("score_chosen", float("nan"), "score_chosen", "finite"),
        ("score_rejected", float("inf"), "score_rejected", "finite"),
    ],
)
def test_a_bad_row_is_dropped_by_column_and_reason(path: str, value: Any, column: str, reason: str) -> None:
    pairs, report = pairs_of([mend(scored_rows(1)[0], path, value), *scored_rows(3)[1:]])
    assert len(pairs) == 2
    ((found, tally),) = report.dropped.items()
    assert reason in found
    assert tally.first.startswith(f"rows row 1, column {column}")
    _, strict = pairs_of([mend(scored_rows(1)[0], path, value), *scored_rows(3)[1:]], bad_rows="error")
    assert found in strict.faults


@pytest.mark.parametrize(
    ("path", "value", "column"),
    [
        ("chosen", "text", "chosen"),
        ("chosen", ["text"], "chosen[0]"),
        ("rejected", {"role": "assistant", "content": "text"}, "rejected"),
        ("score_chosen", "7.5", "score_chosen"),
        ("score_rejected", True, "score_rejected"),
        ("score_rejected", {"overall": 3}, "score_rejected"),
    ],
)
def test_a_row_of_another_shape_is_a_fault_that_stops(path: str, value: Any, column: str) -> None:
    rows = scored_rows(3)
    _, report = pairs_of([*rows[1:], mend(rows[0], path, value)])
    (tally,) = report.faults.values()
    assert tally.first.startswith(f"rows row 3, column {column}")
    with pytest.raises(DataError, match=column.split("[", maxsplit=1)[0]):
        encode(make_tokenizer("chatml"), [*rows[1:], mend(rows[0], path, value)])


def test_equal_responses_and_late_system_turns_are_bad() -> None:
    row = scored_rows(1)[0]
    same = copy.deepcopy(row)
    same["rejected"][-1]["content"] = same["chosen"][-1]["content"] + " "
    for turns in (row["chosen"], row["rejected"]):
        turns.insert(1, {"role": "system", "content": "x"})
    pairs, report = pairs_of([same, row])
    assert not pairs
    assert any("same text" in reason for reason in report.dropped)
    assert any("system message after" in reason for reason in report.dropped)


def test_real_data_are_kept_and_dropped_as_described(real_pairs: Path) -> None:
    table, report = stored_pairs(Source(str(real_pairs)), "train", Rules())
    encoder = Encoder(make_tokenizer("chatml"), OverallGoal(), 512)
    pairs = encode_pairs(table, encoder, Relabelling(), report)
    # 800 rows: 84 exact ties, 2 identical pairs, 1 blank response; one of the two identical pairs is a tie as well,
    # and one chosen response is nothing but a zero-width blank
    assert report.read == 800
    assert sum(tally.count for tally in report.dropped.values()) == 87
    assert len(pairs) == 2 * 713


def test_rows_that_need_repair_late_in_a_large_file_are_kept() -> None:
    """Columns that are empty in the first 100 rows must not decide what the later ones may hold."""
    rows = scored_rows(260)
    rows[200]["chosen"][-1]["content"] += " <|im_end|>"
    rows[201]["score_chosen"] = rows[201]["score_rejected"] = 5.0
    pairs, report, _ = encode(make_tokenizer("chatml"), rows)
    assert (report.pairs, len(pairs)) == (259, 518)
    assert sum(tally.count for tally in report.repaired.values()) == 1
    for row in rows[:120]:
        row["score_chosen"] = row["score_rejected"] = 5.0
    pairs, report, _ = encode(make_tokenizer("chatml"), rows)
    assert report.pairs == 139


def test_a_score_outside_the_scale_can_be_dropped_or_clipped_and_is_counted() -> None:
    rows = scored_rows(4)
    rows[2]["score_rejected"] = 0.0
    pairs, report = pairs_of(rows, outside_scale="drop")
    assert len(pairs) == 3
    assert report.dropped["score outside the declared scale"].first == "rows row 3, column score_rejected, found 0.0"
    pairs, report = pairs_of(rows, outside_scale="clip")
    assert pairs[2].rewards == (rows[2]["score_chosen"], 1.0)
    assert sum(tally.count for tally in report.repaired.values()) == 1


def test_both_goals_cut_a_response_at_the_same_place() -> None:
    rows = scored_rows(1)
    rows[0]["score_chosen"], rows[0]["score_rejected"] = 10.0, 2.5  # "2.5" takes more tokens than "10"
    rows[0]["chosen"][-1]["content"] = "apple pear " * 40
    pairs, report, _ = encode(make_tokenizer("chatml"), rows, max_length=110)
    high, low = pairs.example(0), pairs.example(1)
    assert high.chosen_ids == low.rejected_ids
    assert report.truncated["end of the chosen response cut"].count == 1
    assert max(len(e.prompt_ids) + len(e.chosen_ids) for e in (high, low)) <= 110


@pytest.mark.parametrize(
    ("mode", "origins", "of_ties"),
    [
        ("both", "chosen-goal rejected-goal", "chosen-goal"),
        ("half", "chosen-goal rejected-goal", "chosen-goal"),
        ("chosen", "chosen-goal", "chosen-goal"),
        ("rejected", "rejected-goal", ""),
        ("none", "unconditioned", "unconditioned"),
    ],
)
def test_each_mode_makes_the_halves_it_names_and_never_both_of_a_tie(mode: Any, origins: str, of_ties: str) -> None:
    relabelling = Relabelling(mode)
    assert [ORIGINS[i] for i in relabelling.origins] == origins.split()
    assert [ORIGINS[i] for i in relabelling.of_ties] == of_ties.split()
    assert relabelling.conditioned is (mode != "none")
    if mode == "none":
        with pytest.raises(ConfigError, match="keep_original has no effect with relabel none"):
            Relabelling(mode, keep_original=True)
        return
    kept = Relabelling(mode, keep_original=True)
    assert [ORIGINS[i] for i in kept.origins] == [*origins.split(), "unconditioned"]
    assert [ORIGINS[i] for i in kept.of_ties] == [*of_ties.split(), "unconditioned"]
    assert kept.conditioned


def test_without_a_mode_both_halves_where_there_is_a_goal() -> None:
    assert Relabelling.of(None, OverallGoal(), False, 3) == Relabelling("both", False, 3)
    assert Relabelling.of(None, OverallGoal(), True, 3) == Relabelling("both", True, 3)
    assert Relabelling.of(None, None, False, 3) == Relabelling("none", False, 3)
    assert Relabelling.of("chosen", None, False, 4) == Relabelling("chosen", False, 4)
    assert Relabelling() == Relabelling("both", keep_original=False, seed=0)


def test_weights_below_one_and_above_are_taken_and_one_needs_no_halves() -> None:
    assert Relabelling().weights(0.25) == (1.0, 0.25, 1.0, 1.0, 1.0, 0.25)
    assert Relabelling().weights(1.5) == (1.0, 1.5, 1.0, 1.0, 1.0, 1.5)
    with pytest.raises(ConfigError, match=r"must be above 0 and finite, found -0\.5"):
        Relabelling().weights(-0.5)
    for mode in ("none", "chosen", "rejected", "half"):
        assert Relabelling(mode).weights(1.0) == (1.0,) * 6  # type: ignore[arg-type]


def test_the_seeded_half_is_the_same_in_every_version() -> None:
    """What a run with relabel half trained on must be found again by later ones: these prompts, of these seeds."""
    prompts = [({"role": "user", "content": str(i)},) for i in range(16)]
    taken = {seed: [i for i, p in enumerate(prompts) if Relabelling("half", seed=seed).takes(p)] for seed in (0, 1)}
    assert taken == {0: [1, 3, 4, 7, 9, 11, 13, 14], 1: [0, 1, 3, 4, 5, 6, 8, 11, 14, 15]}
    assert all(Relabelling("both", seed=1).takes(p) for p in prompts)


@pytest.mark.parametrize(("pairs", "ties"), [(3, 0), (0, 2), (3, 2), (1, 1)])
@pytest.mark.parametrize(
    ("relabelling", "origins", "of_ties"),
    [
        (Relabelling(), (0, 1), (0,)),
        (Relabelling(keep_original=True), (0, 1, 2), (0, 2)),
        (Relabelling("rejected", keep_original=True), (1, 2), (2,)),
    ],
)
def test_training_pairs_are_counted_pair_by_pair(
    relabelling: Relabelling, origins: tuple[int, ...], of_ties: tuple[int, ...], pairs: int, ties: int
) -> None:
    scored = [replace(pair_of(scored_rows(1)[0]), tie=i >= pairs) for i in range(pairs + ties)]
    index = TrainingIndex([made.origin for made in relabelling.made_of(pair, OverallGoal())] for pair in scored)
    expected = [(row, origin) for row in range(pairs) for origin in origins]
    expected += [(pairs + row, origin) for row in range(ties) for origin in of_ties]
    assert [(index[i][0], index.origins[i]) for i in range(len(index))] == expected
    places = [place for _, made in groupby(row for row, _ in expected) for place, _ in enumerate(made)]
    assert [index[i][1] for i in range(len(index))] == places
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError, match=str(outside)):
            index[outside]


def test_a_view_is_read_from_both_ends() -> None:
    pairs = [pair_of(row) for row in scored_rows(3)]
    view = RelabelledView(pairs, OverallGoal())
    assert [view[-i] for i in range(1, 7)] == [view[6 - i] for i in range(1, 7)]
    for outside in (-7, 6):
        with pytest.raises(IndexError, match=str(outside)):
            view[outside]
    plain = RelabelledView(pairs, None)
    assert [half.origin for half in plain] == ["unconditioned"] * 3
    assert [half.chosen for half in plain] == [view[2 * i].chosen for i in range(3)]
    rejected = RelabelledView(pairs, OverallGoal(), Relabelling("rejected"))
    assert [rejected[i] for i in range(3)] == [view[2 * i + 1] for i in range(3)]


def test_a_relabelled_pair_says_where_it_comes_from_and_what_is_asked() -> None:
    row = scored_rows(2)[1]
    pair, goal = pair_of(row), OverallGoal()
    made = [relabel(pair, goal, origin, 6.5) for origin in range(6)]
    printed = [f"{row['score_chosen']:g}", f"{row['score_rejected']:g}", None, "10", "6.5", "6.5"]
    assert [m.goal for m in made] == printed
    own = [goal.text(row["score_chosen"]), goal.text(row["score_rejected"])]
    assert [m.goal_text for m in made] == [*own, None, goal.text(10), *[goal.text(6.5)] * 2]
    asked = [m.goal_reward for m in made]
    assert math.isnan(asked.pop(UNCONDITIONED))
    assert asked == [row["score_chosen"], row["score_rejected"], 10.0, 6.5, 6.5]
    assert [m.origin for m in made] == list(ORIGINS)
    assert {m.pair_id for m in made} == {pair.id}
    assert (made[5].chosen, made[5].rewards) == (made[1].chosen, made[1].rewards)
    for other in (made[2], made[3], made[4]):
        assert other.rewards == made[0].rewards == (row["score_chosen"], row["score_rejected"])
        assert (other.chosen, other.rejected) == (made[0].chosen, made[0].rejected)


def test_each_half_asks_for_the_attributes_of_the_response_it_prefers() -> None:
    pair = replace(pair_of(scored_rows(1)[0]), rewards=(8.0, 3.0), attributes=((2.0, 9.0), (5.0, 1.0)))
    goal = AttributeGoal(["kind", "clear"])
    high, low = (relabel(pair, goal, origin) for origin in (0, 1))
    assert (high.goal, low.goal) == ("2 9 8", "5 1 3")
    assert (high.goal_text, low.goal_text) == (goal.text(8, (2, 9)), goal.text(3, (5, 1)))


def test_pairs_tie_by_what_is_printed_attributes_included() -> None:
    pair = replace(pair_of(scored_rows(1)[0]), rewards=(7.04, 6.96), attributes=((1.0,), (1.0,)))
    assert is_tie(OverallGoal(), pair.rewards, pair.attributes)
    assert is_tie(AttributeGoal(["kind"]), pair.rewards, pair.attributes)
    assert not is_tie(OverallGoal(RewardScale(decimals=2)), pair.rewards, pair.attributes)
    assert not is_tie(AttributeGoal(["kind"]), pair.rewards, ((1.0,), (2.0,)))
    same = replace(pair, rewards=(7.0, 7.0), attributes=((1.0,), (2.0,)))
    assert is_tie(AttributeGoal(["kind"]), same.rewards, same.attributes), "neither response is preferred"


# -- the best goal for every pair --------------------------------------------------------------------------------------


def best_rows(*rewards: tuple[float, float]) -> list[dict[str, Any]]:
    rows = scored_rows(len(rewards))
    for row, (high, low) in zip(rows, rewards, strict=True):
        row["score_chosen"], row["score_rejected"] = high, low
    return rows


def test_under_the_best_goal_every_pair_prefers_its_winner(family: str) -> None:
    rows = best_rows((8, 3), (10, 9), (2, 1))
    pairs, report, encoder = encode(make_tokenizer(family), rows, relabelling=Relabelling(best_goal=True))
    found = [pairs.example(i) for i in range(len(pairs))]
    assert [ORIGINS[one.origin] for one in found].count("best-goal") == 2
    assert (report.relabelled, len(pairs), len(pairs.sizes())) == (8, 8, 8)
    assert [one.size for one in found] == pairs.sizes()
    ((reason, tally),) = report.noted.items()
    assert "best goal already" in reason
    assert (tally.count, "line 2" in tally.first) == (1, True), "it is trained on once, and said"
    for one in found:
        if one.origin != BEST_GOAL:
            continue
        own = next(other for other in found if other.pair_id == one.pair_id and other.origin == 0)
        assert (one.chosen_ids, one.rejected_ids) == (own.chosen_ids, own.rejected_ids)
        assert (one.rewards, one.goal, one.goal_reward) == (own.rewards, "10", 10.0)
        assert "Overall score: 10." in encoder.tokenizer.decode(one.prompt_ids)


@pytest.mark.parametrize("mode", ["both", "chosen", "rejected", "half"])
@pytest.mark.parametrize("keep", [False, True])
def test_no_training_pair_is_made_twice_or_contradicted_with_the_best_goal(mode: Any, keep: bool) -> None:
    rows = best_rows(*[(10, 3), (8, 3), (9.98, 9.9), (10, 9.98), (5, 5), (7.04, 6.96), (9.96, 2)] * 3)
    made = Relabelling(mode, keep, best_goal=True)
    pairs, _ = pairs_of(rows, relabelling=made, ties="chosen" if mode != "rejected" or keep else "drop")
    view = RelabelledView(pairs, OverallGoal(), made)
    for pair in pairs:
        own = [one for one in view if one.pair_id == pair.id]
        texts = [one.goal_text for one in own]
        assert len(set(texts)) == len(texts), "the same prompt twice is a repeat or a contradiction"
        if pair.tie:
            assert "best-goal" not in {one.origin for one in own}, "a tie has no winner"
    assert {one.origin for one in view} >= {"best-goal"}


def test_a_loser_whose_attributes_read_like_the_best_goal_is_never_contradicted() -> None:
    goal = AttributeGoal(["kind", "clear"], overall=False)
    pair = replace(pair_of(scored_rows(1)[0]), rewards=(9.0, 8.0), attributes=((9.0, 8.0), (10.0, 10.0)))
    made = Relabelling(best_goal=True)
    assert [ORIGINS[one.origin] for one in made.made_of(pair, goal)] == ["chosen-goal", "rejected-goal"]
    one = relabel(replace(pair, attributes=((9.0, 8.0), (1.0, 1.0))), goal, BEST_GOAL)
    assert one.goal == "10 10"
    assert one.goal_text == goal.text(10, (10, 10))


@pytest.mark.parametrize(
    ("scale", "best", "asked"),
    [
        (RewardScale(0, 100), "100", 100.0),
        (LinearScale(judge_low=-20, judge_high=5), "10", 7.0),
        (LinearScale(judge_low=-20, judge_high=9), "10", 9.0),
        (QuantileScale(knots=[0.0, 2.0, 30.0]), "10", 30.0),
    ],
)
def test_the_best_goal_asks_for_a_reward_that_the_winner_is_nearest_to(
    scale: RewardScale, best: str, asked: float
) -> None:
    """In the judge's units, in which reward-aware losses measure; beyond a mapped scale's end, all rewards are it."""
    pair = replace(pair_of(scored_rows(1)[0]), rewards=(7.0, 2.0))
    one = relabel(pair, OverallGoal(scale), BEST_GOAL)
    assert (one.goal, one.goal_reward) == (best, asked)


def test_the_best_goal_needs_goals() -> None:
    with pytest.raises(ConfigError, match="best_goal has no effect with relabel none"):
        Relabelling("none", best_goal=True)
    with pytest.raises(ConfigError, match="best_goal has no effect with relabel none"):
        Relabelling.of(None, None, False, 0, best_goal=True)
    assert [ORIGINS[i] for i in Relabelling("rejected", True, best_goal=True).origins] == [
        "rejected-goal", "best-goal", "unconditioned"
    ]  # fmt: skip


def test_a_goal_is_chosens_own_reward_the_best_or_none() -> None:
    assert {origin.name: origin.goal for origin in ORIGIN_TABLE} == {
        "chosen-goal": "own", "rejected-goal": "own", "unconditioned": None, "best-goal": "best",
        "upper-goal": "drawn", "lower-goal": "drawn",
    }  # fmt: skip
