"""Laws 1 and 2: under the loser's goal the responses change places; goals that print the same never make two halves."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import make_tokenizer, scored_rows
from rap_lightning.batches.dataset import encode_pairs
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import DataError
from rap_lightning.preferences.goals import OverallGoal, RewardScale
from rap_lightning.preferences.pairs import BadRow, read_pair
from rap_lightning.preferences.relabel import RelabelledView


def encode(family: str, rows: list[dict[str, Any]], **options: Any) -> Any:
    encoder = Encoder(make_tokenizer(family), options.pop("goal", OverallGoal()), options.pop("max_length", 512))
    return encode_pairs(datasets.Dataset.from_list(rows), encoder, source="rows", split="train"), encoder


def test_the_view_swaps_under_the_rejected_goal_and_edits_nothing() -> None:
    rows = scored_rows(12)
    before = copy.deepcopy(rows)
    pairs = [read_pair(row) for row in rows]
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
    (pairs, _), encoder = encode(family, rows)
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
    (pairs, _), encoder = encode(family, rows, goal=None)
    assert len(pairs) == 6
    assert {pairs.example(i).origin for i in range(6)} == {2}
    assert not any("score" in encoder.tokenizer.decode(pairs.example(i).prompt_ids) for i in range(6))


def test_goals_that_print_the_same_are_dropped_and_counted(family: str) -> None:
    rows = scored_rows(6)
    rows[1]["score_chosen"] = rows[1]["score_rejected"] = 7.0
    rows[4]["score_chosen"], rows[4]["score_rejected"] = 7.04, 6.96  # both print "7"
    (pairs, report), _ = encode(family, rows)
    assert (report.read, report.pairs, report.relabelled, len(pairs)) == (6, 4, 8, 8)
    ties = {reason: tally for reason, tally in report.dropped.items() if "tie" in reason}
    assert sum(tally.count for tally in ties.values()) == 2
    assert {tally.first for tally in ties.values()} == {"row 2, column score_rejected", "row 5, column score_rejected"}
    with pytest.raises(ValueError, match="tie"):
        RelabelledView([read_pair(rows[4])], OverallGoal())[0]


def test_scores_the_wrong_way_round_are_exchanged_and_counted() -> None:
    rows = scored_rows(3)
    rows[0]["score_chosen"], rows[0]["score_rejected"] = 2.0, 9.0
    (pairs, report), encoder = encode("chatml", rows)
    assert sum(t.count for r, t in report.repaired.items() if "exchanged" in r) == 1
    example = pairs.example(0)
    assert example.rewards == (9.0, 2.0)
    assert encoder.tokenizer.decode(example.chosen_ids).startswith(rows[0]["rejected"][-1]["content"])


def test_scores_outside_the_declared_scale_stop_with_the_rows() -> None:
    rows = scored_rows(4)
    rows[2]["score_chosen"] = 55.0
    with pytest.raises(DataError, match=r"from 1 to 10.*row 3 \(score_chosen = 55\)"):
        encode("chatml", rows)
    (_, report), _ = encode("chatml", rows, goal=OverallGoal(RewardScale(0, 100)))
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
        ("prompt", " ", "prompt", "non-empty"),
        ("chosen", "text", "chosen", "list of messages"),
        ("chosen", [], "chosen", "list of messages"),
        ("chosen.-1.content", None, "chosen", "without text"),
        ("chosen.-1.content", "  ", "chosen", "empty response"),
        ("rejected.-1.role", "tool", "rejected", "role"),
        ("rejected.-1.role", "user", "rejected", "alternate"),
        ("rejected.0.content", "another question", "rejected", "different conversations"),
        ("score_chosen", None, "score_chosen", "finite"),
        ("score_chosen", float("nan"), "score_chosen", "finite"),
        ("score_rejected", float("inf"), "score_rejected", "finite"),
        ("score_rejected", True, "score_rejected", "finite"),
    ],
)
def test_a_bad_row_is_named_by_column_and_reason(path: str, value: Any, column: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as caught:
        read_pair(mend(scored_rows(1)[0], path, value))
    assert caught.value.column == column


def test_equal_responses_and_late_system_turns_are_bad() -> None:
    row = scored_rows(1)[0]
    same = copy.deepcopy(row)
    same["rejected"][-1]["content"] = same["chosen"][-1]["content"] + " "
    with pytest.raises(BadRow, match="same text"):
        read_pair(same)
    row["chosen"].insert(1, {"role": "system", "content": "x"})
    with pytest.raises(BadRow, match="system message after"):
        read_pair(row)


def test_real_data_are_kept_and_dropped_as_described(real_pairs: Path) -> None:
    rows = datasets.load_dataset(str(real_pairs), split="train")
    encoder = Encoder(make_tokenizer("chatml"), OverallGoal(), 512)
    pairs, report = encode_pairs(rows, encoder, source="real", split="train")
    # 800 rows: 84 exact ties, 2 identical pairs, 1 blank response; one of the two identical pairs is a tie as well
    assert report.read == 800
    assert sum(tally.count for tally in report.dropped.values()) == 86
    assert len(pairs) == 2 * 714


def test_rows_that_need_repair_late_in_a_large_file_are_kept() -> None:
    """Columns that are empty in the first 100 rows must not decide what the later ones may hold."""
    rows = scored_rows(260)
    rows[200]["chosen"][-1]["content"] += " <|im_end|>"
    rows[201]["score_chosen"] = rows[201]["score_rejected"] = 5.0
    (pairs, report), _ = encode("chatml", rows)
    assert (report.pairs, len(pairs)) == (259, 518)
    assert sum(tally.count for tally in report.repaired.values()) == 1
    for row in rows[:120]:
        row["score_chosen"] = row["score_rejected"] = 5.0
    (pairs, report), _ = encode("chatml", rows)
    assert report.pairs == 139


def test_a_score_outside_the_scale_can_be_dropped_and_is_counted() -> None:
    rows = scored_rows(4)
    rows[2]["score_rejected"] = 0.0
    encoder = Encoder(make_tokenizer("chatml"), OverallGoal(), 512)
    table = datasets.Dataset.from_list(rows)
    _, report = encode_pairs(table, encoder, source="rows", split="train", drop_outside=True)
    assert report.pairs == 3
    assert report.dropped["score outside the declared scale"].first == "row 3, column score_rejected"


def test_both_goals_cut_a_response_at_the_same_place() -> None:
    rows = scored_rows(1)
    rows[0]["score_chosen"], rows[0]["score_rejected"] = 10.0, 2.5  # "2.5" takes more tokens than "10"
    rows[0]["chosen"][-1]["content"] = "apple pear " * 40
    (pairs, report), _ = encode("chatml", rows, max_length=110)
    high, low = pairs.example(0), pairs.example(1)
    assert high.chosen_ids == low.rejected_ids
    assert report.truncated["end of the chosen response cut"].count == 1
    assert max(len(e.prompt_ids) + len(e.chosen_ids) for e in (high, low)) <= 110
