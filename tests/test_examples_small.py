"""The one-file examples, used as their first lines say."""

import doctest
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, run_command
from rap_lightning.preferences.scales import RewardScale

EXAMPLES = ROOT / "examples"


def command(*args: str, cwd: Path) -> str:
    sys.path.insert(0, str(EXAMPLES))
    done = run_command(*args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["my_goal", "my_rows", "my_judge"])
def test_what_their_docstrings_show_is_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted >= 1
    assert found.failed == 0


def test_the_tests_of_the_example_loss_pass(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(EXAMPLES / "my_losses")
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # it is no part of this session
        monkeypatch.delenv(name)
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "test_my_losses.py"]) == 0
    assert "4 passed" in capfd.readouterr().out


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


SMALL = {"base_steps=300": "base_steps=20", "max_steps=100": "max_steps=2", "samples=64": "samples=2"}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_the_notebook_runs_from_top_to_bottom_and_its_goals_steer(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "steering.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells), "outputs go stale; run it to see them"
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for full, small in () if whole else SMALL.items():
        assert code.count(full) == 1, full
        code = code.replace(full, small)
    space: dict[str, Any] = {"__name__": "notebook"}
    exec(code, space)
    curve = space["curve"]
    assert set(curve) == {1, 4, 7, 10}
    if whole:
        assert curve[10] > curve[1] + 1
