"""evaluate in a run's folder: data read as the run read them, and figures that a second evaluation leaves alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import called, make_model, scored_rows, write_jsonl
from rap_lightning.preferences.goals import OverallGoal

called = partial(called, "evaluate")
OBEDIENT = [
    *("--engine", "rigged.Obedient", "--samples", 1, "--goals", "[1, 10]"),
    *("--judge", "Function", "--judge.function", "rigged.face_value", "--judge.scale", "[1, 10]"),
]  # fmt: skip
ADAPTER = """
def adapt(row):
    pair = {"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]}
    return pair | {"score_chosen": row["judge_a"], "score_rejected": row["judge_b"]}
"""


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


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
