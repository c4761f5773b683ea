"""evaluate in a run's folder: data read as the run read them, and figures that a second evaluation leaves alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from conftest import called, make_model, scored_rows, write_jsonl
from rap_lightning.preferences.goals import OverallGoal
from test_evaluate import document

called = partial(called, "evaluate")
OBEDIENT = [
    *("--engine", "stub_judges.Obedient", "--samples", 1, "--goals", "[1, 10]"),
    *("--judge", "Function", "--judge.function", "stub_judges.face_value", "--judge.scale", "[1, 10]"),
]  # fmt: skip
ADAPTER = """
def adapt(row):
    pair = {"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]}
    return pair | {"score_chosen": row["judge_a"], "score_rejected": row["judge_b"]}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("again") / "base")


def make_run(folder: Path, model: Path, data_options: str = "") -> Path:
    """A run's folder that fit could have left: its base beside it, its policy in hf."""
    (folder / "hf").mkdir(parents=True)
    for file in model.iterdir():
        (folder / "hf" / file.name).symlink_to(file)
    (folder / "hf" / "goal.json").write_text(json.dumps(OverallGoal().record()))
    (folder / "run.json").write_text(json.dumps({"folder": str(folder.parent)}))
    (folder / "config.yaml").write_text(f"model:\n  policy:\n    path: {model}\n{data_options}")
    return folder


@pytest.fixture
def own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of one's own shape: a question, two answers, two scores, of which one is a failed judge's 0."""
    rows = [
        {"question": f"{i}: why?", "good": f"{i} so", "bad": f"{i} no", "judge_a": 9 - i % 3, "judge_b": 2 + i % 3}
        for i in range(8)
    ]
    rows[3]["judge_b"] = 0
    (tmp_path / "my_rows.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "rows" / f"{split}.jsonl", rows)
    return tmp_path / "rows"


DATA = "data:\n  format: my_rows.adapt\n  outside_scale: drop\n"


def test_data_are_read_as_the_models_run_read_them(
    own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "version_0", model, DATA)
    assert called("--model", run / "hf", "--source", own_rows, *OBEDIENT, "--parts", "[extrapolation]") == 0
    out = capsys.readouterr().out
    assert "read as the run read its own" in out
    assert "format my_rows.adapt, outside_scale drop" in out
    assert f"looked for here; the run was started in {tmp_path}" in out
    found = document(run / "evaluation")
    assert found["pairs"] == 7, "the row outside the scale is left out"
    assert found["extrapolation"]["training"]["responses"] == 15, "so is its reward among those that training showed"


def test_columns_of_the_run_are_renamed_and_an_option_wins(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scored_rows(6)
    write_jsonl(tmp_path / "ours.jsonl", rows)
    theirs = [{("mark" if key == "score_chosen" else key): value for key, value in row.items()} for row in rows]
    write_jsonl(tmp_path / "theirs.jsonl", theirs)
    section = (
        "data:\n  class_path: rap_lightning.PreferenceDataModule\n  init_args:\n    columns: {mark: score_chosen}\n"
    )
    run = make_run(tmp_path / "version_0", model, section)
    args = ["--model", run / "hf", "--parts", "[length]", *OBEDIENT]
    assert called(*args, "--source", tmp_path / "theirs.jsonl", "--output", tmp_path / "a") == 0
    assert "columns {'mark': 'score_chosen'}" in capsys.readouterr().out
    assert called(*args, "--source", tmp_path / "ours.jsonl", "--output", tmp_path / "b", "--columns", "{}") == 0
    assert "as the run read" not in capsys.readouterr().out
    assert document(tmp_path / "a")["pairs"] == document(tmp_path / "b")["pairs"] == 6


def test_scores_outside_the_scale_can_be_left_out_or_clipped_by_option(
    own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "version_0", model)
    args = ["--model", run / "hf", "--source", own_rows, "--format", "my_rows.adapt", "--parts", "[length]", *OBEDIENT]
    assert called(*args) == 2
    assert "outside_scale drop" in capsys.readouterr().err
    for option, pairs in (("drop", 7), ("clip", 8)):
        assert called(*args, "--outside_scale", option, "--output", tmp_path / option) == 0
        assert document(tmp_path / option)["pairs"] == pairs


# -- a second evaluation in the same folder ---------------------------------------------------------------------------


def test_parts_measured_before_stay(
    own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "version_0", model, DATA)
    args = ["--model", run / "hf", "--source", own_rows]
    judged = [*OBEDIENT[:4], "--goals", "[none, 1, 10]", *OBEDIENT[6:]]
    assert called(*args, *judged, "--parts", "[controllability]") == 0
    first = document(run / "evaluation")
    samples = (run / "evaluation" / "samples.jsonl").read_bytes()
    assert called(*args, "--scale_points", 3) == 0, "without a judge log-probabilities are measured"
    second = document(run / "evaluation")
    assert "kept from before: controllability" in capsys.readouterr().out
    assert {"controllability", "unlearning", "discrimination"} <= second.keys()
    of_samples = ("controllability", "without_goal", "samples", "goals", "judge", "temperature", "samples_per_prompt")
    assert all(second[key] == first[key] for key in of_samples)
    assert (run / "evaluation" / "samples.jsonl").read_bytes() == samples
    assert set(second["left_out"]) == {"extrapolation", "length"}, "the part that stands is not left out"
    assert [(one["parts"], one["seconds"]) for one in second["runs"]] == [
        (["controllability"], first["seconds"]), (["unlearning", "discrimination"], second["seconds"]),
    ]  # fmt: skip
    assert called(*args, *judged, "--parts", "[length]") == 0
    third = document(run / "evaluation")
    assert third["controllability"] == first["controllability"]
    assert third["unlearning"] == second["unlearning"]
    assert set(third["without_goal"]) == {"controllability", "length"}
    assert set(third["left_out"]) == {"extrapolation"}
    assert third["base"] == second["base"] == str(model)


def test_a_part_measured_again_is_replaced_alone(own_rows: Path, model: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "version_0", model, DATA)
    args = ["--model", run / "hf", "--source", own_rows]
    assert called(*args, "--parts", "[unlearning]", "--bins", 1) == 0
    assert called(*args, "--parts", "[unlearning]", "--bins", 2, "--limit", 3) == 0, "nothing of other settings is left"
    found = document(run / "evaluation")
    assert (len(found["unlearning"]["bins"]), found["prompts"]) == (2, 3)
    assert [one["parts"] for one in found["runs"]] == [["unlearning"]]


@pytest.mark.parametrize("change", ["--limit 3", "--seed 1", "--format auto", "an earlier version's file"])
def test_parts_of_other_settings_are_not_mixed_nor_lost(
    change: str, own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "version_0", model, DATA)
    args = ["--model", run / "hf", "--source", own_rows]
    assert called(*args, "--parts", "[discrimination]", "--scale_points", 2) == 0
    path = run / "evaluation" / "evaluation.json"
    more = change.split() if change.startswith("--") else []
    if change == "--format auto":  # other data
        rows = scored_rows(4)
        args[3] = write_jsonl(tmp_path / "other.jsonl", rows)
    if not more:
        found = document(run / "evaluation")
        del found["runs"]
        path.write_text(json.dumps(found))
    before = path.read_bytes()
    capsys.readouterr()
    assert called(*args, "--parts", "[unlearning]", *more) == 2
    assert path.read_bytes() == before
    said = capsys.readouterr().err
    assert f"{path} holds discrimination" in said
    assert {
        "--limit 3": "prompts: 7 there, 3 now", "--seed 1": "seed: 0 there, 1 now", "--format auto": "data:",
        "an earlier version's file": "does not say how",
    }[change] in said  # fmt: skip
    assert ("--parts '[unlearning,discrimination]'" in said) is (change != "--seed 1"), (
        "another seed doesn't go on there"
    )
    assert "another --output" in said


def test_figures_of_few_prompts_carry_a_warning(
    own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", make_run(tmp_path / "version_0", model) / "hf", "--parts", "[controllability]", *OBEDIENT]
    data = write_jsonl(tmp_path / "many.jsonl", scored_rows(20))
    assert called(*args, "--source", data, "--limit", 19, "--output", tmp_path / "few") == 0
    (warning,) = document(tmp_path / "few")["warnings"]
    assert "19 prompts are too few" in warning
    assert f"warning: {warning}" in capsys.readouterr().out
    assert called(*args, "--source", data, "--output", tmp_path / "enough") == 0
    assert document(tmp_path / "enough")["warnings"] == []
    assert "warning" not in capsys.readouterr().out


def test_what_is_left_out_is_said_once(
    own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "version_0", model, DATA)
    assert called("--model", run / "hf", "--source", own_rows, "--scale_points", 2, "--bins", 1) == 0
    assert capsys.readouterr().out.count("left out: controllability") == 1


def test_extrapolation_does_not_outlive_the_training_data_it_was_compared_with(
    own_rows: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "version_0", model, DATA)
    measure = ("--model", run / "hf", "--source", own_rows, *OBEDIENT, "--parts")
    assert called(*measure, "[extrapolation,controllability]") == 0
    train = own_rows / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:4]))
    assert called(*measure, "[length]") == 2
    assert "training data:" in capsys.readouterr().err
    assert called(*measure, "[extrapolation,length]") == 0, "measured again, it is of the data as they are"
    found = document(run / "evaluation")
    assert {"controllability", "extrapolation", "length"} <= found.keys()
    assert found["extrapolation"]["training"]["responses"] == 7
