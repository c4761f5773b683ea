"""The one-file examples, used as their first lines say."""

import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from rap_lightning.preferences.scales import RewardScale

EXAMPLES = ROOT / "examples"


def command(*args: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rap_lightning.cli.main", *args],
        capture_output=True, text=True, timeout=120, cwd=cwd, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["my_goal", "my_rows", "my_judge"])
def test_what_their_docstrings_show_is_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted >= 1
    assert found.failed == 0


def test_the_tests_of_the_example_loss_pass() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_my_losses.py"],
        cwd=EXAMPLES / "my_losses", env=_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_rows_of_ones_own_shape_are_read_and_those_left_out_counted(tmp_path: Path) -> None:
    row = {"question": "2 + 2?", "answers": [{"text": "4", "stars": 5}, {"text": "5", "stars": 1}]}
    rows = [{**row, "question": f"{n} + 2?", "flagged": n == 3} for n in range(5)]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scale = ["--goal", "OverallGoal", "--goal.scale.high", "5"]
    text = command("inspect", "--source", "reviews.jsonl", "--format", "my_rows.adapt", *scale, cwd=tmp_path)
    assert "4 pairs kept" in text
    assert "dropped 1: left out by your adapter" in text


def test_a_goal_of_ones_own_stands_before_the_prompt(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "score_chosen": 9, "score_rejected": 2.5}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    text = command("inspect", "--source", "pairs.jsonl", "--goal", "my_goal.Stars", cwd=tmp_path)
    assert "Wanted: 9 of 10 stars." in text
    assert "Wanted: 2.5 of 10 stars." in text


def test_a_goal_of_ones_own_can_be_asked_for_in_an_exported_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    goal = importlib.import_module("my_goal").Stars(RewardScale(1, 10))
    assert goal.checked_wording() is not None  # it writes what text() writes, over the whole scale


def test_a_judge_of_ones_own_scores_a_file(tmp_path: Path) -> None:
    samples = {"prompt": "Name a fruit.", "completions": [{"response": "An apple."}, {"response": "word " * 30}]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(samples) + "\n")
    command("score", "--source", "samples.jsonl", "--output", "scored.jsonl", "--judge", "Function",
            "--judge.function", "my_judge.brevity", cwd=tmp_path)  # fmt: skip
    (line,) = (tmp_path / "scored.jsonl").read_text().splitlines()
    assert [c["overall_score"] for c in json.loads(line)["completions"]] == [10.0, 6.0]


def test_the_notebook_runs_from_top_to_bottom_and_its_goals_steer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "steering.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells), "outputs go stale; run it to see them"
    space: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    curve = space["curve"]
    assert curve[10] > curve[1] + 1
