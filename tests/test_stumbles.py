"""A stranger's own file: what is said of it names the row, the column as the file has it, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import build, called, make_trainer, read_jsonl, scored_rows, write_jsonl
from rap_lightning.commands.inspect import inspect
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal
from rap_lightning.preferences.read_pairs import read_pairs, unreached_goal_note
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import LinearScale, RewardScale
from rap_lightning.preferences.sources import Source

THEIRS = {"score_chosen": "judge_a", "score_rejected": "judge_b"}


def own_rows(count: int = 8) -> list[dict[str, Any]]:
    """Pairs with scores in columns of other names."""
    return [{THEIRS.get(name, name): value for name, value in row.items()} for row in scored_rows(count)]


def read(path: Path, **rules: Any) -> DataReport:
    report = DataReport(path.name, "train")
    list(read_pairs(Source(str(path)), "train", Rules(**rules), report, progress=False))
    return report


def inspected(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """What inspect prints, ended with this code."""
    capsys.readouterr()
    assert called("inspect", "--examples", 0, *args) == code
    out, err = capsys.readouterr()
    return out + err


# -- the scale ---------------------------------------------------------------------------------------------------------


def one_to_five(path: Path) -> Path:
    rows = scored_rows(10)
    for i, row in enumerate(rows):
        row |= {"score_chosen": 3.0 + i % 3, "score_rejected": 1.0 + i % 2}
    return write_jsonl(path, rows)


def test_a_scale_that_was_forgotten_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = one_to_five(tmp_path / "rows.jsonl")
    said = inspected(capsys, "--source", path)
    assert "no reward is above 5 on the scale from 1 to 10 (the lowest is 1)" in said
    assert "the best goal, 10, is never trained on" in said
    assert "goal.scale.high" in said
    assert "no reward" not in inspected(capsys, "--source", path, "--goal.scale.high", 5)
    assert "no reward" not in inspected(capsys, "--source", path, "--goal.scale", "LinearScale")
    assert "no reward" not in inspected(capsys, "--source", path, "--relabel", "none")
    assert "no reward" not in inspected(capsys, "--source", path, "--goal", "null")
    capsys.readouterr()
    assert called("inspect", "--source", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"]["train"].startswith("note: no reward is above 5")
    assert found["splits"][0]["rewards"] == [1.0, 5.0]


def test_the_scale_is_held_against_all_sources_of_the_training_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = one_to_five(tmp_path / "low.jsonl")
    rows = scored_rows(6, seed=1)
    rows[0]["score_chosen"] = 10
    full = write_jsonl(tmp_path / "full.jsonl", rows)
    assert "no reward" not in inspected(capsys, "--source", json.dumps([{"path": str(low)}, {"path": str(full)}]))
    (tmp_path / "splits").mkdir()
    full.rename(tmp_path / "splits" / "train.jsonl")
    low.rename(tmp_path / "splits" / "test.jsonl")
    assert "no reward" not in inspected(capsys, "--source", tmp_path / "splits"), "nobody trains on the other split"


def test_fit_notes_the_scale_as_inspect_does(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = one_to_five(tmp_path / "rows.jsonl")
    for goal, noted in ((OverallGoal(), True), (OverallGoal(RewardScale(1, 5)), False)):
        caplog.clear()
        module, batches = build(tiny, path, goal=goal)
        with caplog.at_level("INFO"):
            make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, batches)
        said = caplog.text + "".join(capsys.readouterr())
        assert ("the best goal, 10, is never trained on" in said) is noted


def test_a_goal_that_does_not_state_the_overall_score_is_not_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row | {"scores_chosen": {"a": 1}, "scores_rejected": {"a": 1}, "score_chosen": 5.0, "score_rejected": 2.0}
        for row in scored_rows(4)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for overall in (True, False):
        inspect(str(path), goal=AttributeGoal(["a"], overall=overall), ties="chosen", examples=0)
        assert ("no reward is above" in capsys.readouterr().out) is overall


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rows.py").write_text(
        "def adapt(row):\n"
        '    scores = {"score_chosen": row["judge_a"] + 0, "score_rejected": row["judge_b"]}\n'
        '    return {"chosen": row["chosen"], "rejected": row["rejected"]} | scores\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rows.adapt"


def test_an_adapters_error_names_the_line_and_shows_the_row(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = own_rows(20)
    rows[17] = {"judge_a": None, "key": "the culprit"} | rows[17] | {"judge_a": None}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"1 fault found:\n  rows\.jsonl line 18, found .*the culprit.*TypeError"):
        read(path, format=adapter)
    said = inspected(capsys, "--source", path, "--format", adapter, code=1)
    assert "fault 1: your adapter raised TypeError" in said
    assert "first: rows.jsonl line 18" in said
    every = write_jsonl(tmp_path / "every.jsonl", [{"judge_a": None, "key": i} for i in range(3)])
    with pytest.raises(DataError, match=r"every\.jsonl line 1, found .*'key': 0.*TypeError"):
        read(every, format=adapter)


def test_columns_beside_an_adapter_are_refused(adapter: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", own_rows())
    assert read(path, format=adapter).pairs == 8
    with pytest.raises(ConfigError, match="no effect beside an adapter"):
        read(path, format=adapter, columns={"judge_a": "score_chosen"})


# -- remedies ----------------------------------------------------------------------------------------------------------

COLUMNS = {theirs: ours for ours, theirs in THEIRS.items()}


def test_text_for_a_number_names_both_columns_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = own_rows()
    rows[2]["judge_a"] = "7.5"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as stop:
        read(path, columns=COLUMNS)
    said = inspected(capsys, "--source", path, "--columns", json.dumps(COLUMNS), code=1)
    for text in (str(stop.value), said):
        assert "rows.jsonl line 3, column score_chosen (judge_a in the file), found '7.5'" in text
        assert "Scores in quotes are not read" in text
        assert "format my_rows.adapt" in text
    assert "Faults were found" in said


def test_scores_outside_the_scale_are_shown_with_their_range_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = own_rows()
    rows[1]["judge_a"], rows[4]["judge_b"], rows[5]["judge_b"] = 88, -3, 0
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    renamed = ["--source", path, "--columns", json.dumps(COLUMNS)]
    said = inspected(capsys, *renamed, code=1)
    assert "fault 3: score outside the declared scale, from -3 to 88 (first: rows.jsonl line 2" in said
    assert "score_chosen (judge_a in the file)" in said
    assert "outside_scale drop" in said
    assert "dropped 3: score outside the declared scale, from -3 to 88" in inspected(
        capsys, *renamed, "--outside_scale", "drop"
    )
    assert "clipped to its end, from -3 to 88" in inspected(
        capsys, *renamed, "--outside_scale", "clip", "--num_proc", 2
    )
    with pytest.raises(DataError, match=r"line 2, column score_chosen \(judge_a in the file\), found 88"):
        read(path, columns=COLUMNS)


def test_bad_rows_that_stop_say_how_they_need_not(tmp_path: Path) -> None:
    rows = own_rows()
    rows[1]["judge_a"] = None
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"1 fault found(?s:.*)bad_rows drop"):
        read(path, columns=COLUMNS, bad_rows="error")


def test_no_pair_left_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"score_chosen": 5, "score_rejected": 5} for row in scored_rows(3)]
    said = inspected(capsys, "--source", write_jsonl(tmp_path / "ties.jsonl", rows), code=1)
    assert "No pair is left of" in said
    assert "Faults" not in said


# -- columns and paths -------------------------------------------------------------------------------------------------


def test_a_map_of_columns_the_wrong_way_round_is_recognised(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", own_rows())
    with pytest.raises(
        ConfigError, match=r"other way round.* Write \{judge_a: score_chosen, judge_b: score_rejected\}"
    ):
        read(path, columns=THEIRS)
    with pytest.raises(DataError, match=r"columns \{theirs: ours\}.*\n?.*format my_rows\.adapt"):
        read(write_jsonl(tmp_path / "odd.jsonl", [{"x": 1}]))


@pytest.mark.parametrize("path", ["my-pairs/", "my pairs/train", "nowhere", "a/b/c", "./here/there", "x/rows.jsonl"])
def test_a_path_to_nothing_is_told_from_a_hub_id(path: str) -> None:
    with pytest.raises(DataError, match="no such file or folder, and not a Hub id"):
        list(read_pairs(Source(path), "train", Rules(), DataReport("", "train")))


def test_a_model_that_is_not_there_is_told_from_a_hub_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", scored_rows(2))
    for args in (
        ("inspect", "--source", path, "--tokenizer", "runs/v/hf"),
        ("generate", "--prompts", path, "--model", "runs/v/hf", "--output", tmp_path / "out.jsonl"),
        ("fit", "--data.source", path, "--model.policy.path", "runs/v/hf", "--trainer.logger", "false"),
    ):
        assert called(*args) == 2
        said = capsys.readouterr().err
        assert "runs/v/hf: no such folder, and not a Hub id (org/name)." in said
        assert "Repo id" not in said


# -- a list of what was left out ---------------------------------------------------------------------------------------


def defective(path: Path, seed: int = 0) -> Path:
    """120 pairs: 9 ties, 5 exchanged, 4 blank responses, 3 repeats, a contradiction."""
    rows = scored_rows(120, seed)
    for i in range(0, 27, 3):
        rows[i]["score_rejected"] = rows[i]["score_chosen"]
    for i in range(31, 36):
        rows[i]["score_chosen"], rows[i]["score_rejected"] = rows[i]["score_rejected"], rows[i]["score_chosen"]
    for i in range(40, 44):
        rows[i]["chosen"][-1]["content"] = " "
    rows[60:63] = rows[50:53]
    turned = {"chosen": rows[70]["rejected"], "rejected": rows[70]["chosen"]}
    rows[71] = {**rows[70], **turned}
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    return write_jsonl(path, rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_row_that_is_counted_is_listed(
    kind: str, processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rap_lightning.preferences import readers

    monkeypatch.setattr(readers, "ROWS", 25)
    path = defective(tmp_path / f"rows.{kind}")
    out = tmp_path / "dropped.jsonl"
    capsys.readouterr()
    assert called("inspect", "--source", path, "--dropped", out, "--num_proc", processes, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["splits"]
    listed = read_jsonl(out)
    counts: dict[tuple[str, str], int] = {}
    for row in listed:
        counts[row["what"], row["reason"]] = counts.get((row["what"], row["reason"]), 0) + 1
    told = {
        (what, reason): tally["count"]
        for what in ("dropped", "left_out", "repaired", "noted", "truncated")
        for reason, tally in report[what].items()
    }
    assert counts == told
    unit = "line" if kind == "jsonl" else "row"
    of = {reason: [row[unit] for row in listed if row["reason"] == reason] for _, reason in counts}
    assert of["tie: both scores print as the same goal (equal)"] == [1 + i for i in range(0, 27, 3)]
    assert of["a pair that was read before"] == [61, 62, 63]
    exchanged = next(numbers for reason, numbers in of.items() if "exchanged" in reason)
    assert exchanged[:5] == [32, 33, 34, 35, 36]
    assert {(row["source"], row["split"], row["file"]) for row in listed} == {(str(path), "train", path.name)}
    assert all(row["column"] for row in listed)
    assert called("inspect", "--source", path, "--dropped", out) == 2, "nothing is written over"
    assert len(out.read_text().splitlines()) == len(listed)


def test_a_list_is_whole_or_not_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", scored_rows(3))
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    out = tmp_path / "list.jsonl"
    assert called("inspect", "--source", tmp_path / "rows.jsonl", "--dropped", out) == 1
    (row,) = read_jsonl(out)
    assert (row["what"], row["line"], row["reason"]) == ("fault", 4, "bytes that are not UTF-8")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    assert called("inspect", "--source", tmp_path / "cut.parquet", "--dropped", tmp_path / "none.jsonl") == 1
    assert not list(tmp_path.glob("*none.jsonl*"))
    assert not list(tmp_path.glob(".none*"))


def test_scales_that_are_fitted_are_not_noted() -> None:
    report = DataReport("", "train", rewards=(1.0, 5.0))
    rules = Rules(OverallGoal(LinearScale(judge_low=0, judge_high=10)), Relabelling("both"))
    assert unreached_goal_note(rules, [report]) is None
    assert unreached_goal_note(Rules(), [report]) is not None
    assert unreached_goal_note(Rules(), [report, DataReport("", "train", rewards=(2.0, 9.96))]) is None, (
        "9.96 prints as 10"
    )
