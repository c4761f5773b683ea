"""The study of docs/study: its short version runs and goes on where it was killed, its numbers are what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT))
from benchmarks.study.arms import ARMS, Trial
from benchmarks.study.laboratory import reading, world
from benchmarks.study.run import BASE, fit
from benchmarks.study.schedule import Plan
from benchmarks.study.settings import FULL, SHORT, Size
from benchmarks.study.statistics import area, difference, hull

TINY = Size(train_pairs=40, test_pairs=12, base_steps=5, steps=2, batch=4)


def study(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.study", "--short", "--output", folder, "--work", folder / "work"]
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_short_study_runs_goes_on_and_writes_its_tables(tmp_path: Path) -> None:
    done = study(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines()
    assert {json.loads(line)["arm"] for line in lines} == {"base", *(SHORT.arms or ())}
    assert {json.loads(line)["stage"] for line in lines} == {"base", "tune", "main", "long", "beta"}
    table = (tmp_path / "README.md").read_text()
    for text in ("H1: goal as strength, best-goal half, minus plain DPO", "four times the steps, T = 0.4", "plain DPO"):
        assert text in table
    assert (tmp_path / "goals.png").stat().st_size > 5000
    # killed while it wrote a line, two runs before the end
    results.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:100])
    assert study(tmp_path).returncode == 0
    again = results.read_text().splitlines()
    assert again[: len(lines) - 2] == lines[:-2]
    bare = [{k: v for k, v in json.loads(line).items() if k != "cpu_s"} for line in (*lines, *again)]
    assert sorted(map(str, bare[: len(lines)])) == sorted(map(str, bare[len(lines) :])), "the same numbers again"


def test_settings_are_chosen_in_worlds_that_no_figure_comes_from() -> None:
    assert not set(FULL.tuning) & set(FULL.seeds)
    assert {len(arm.trials) for arm in ARMS.values()} == {FULL.trials}, "every arm has as many trials"
    few = Size(trials=4)
    assert {job.stage for job in Plan(FULL, {}).open()} == {"base", "tune"}, "nothing is named before it is chosen"

    def line(score: float) -> dict[str, Any]:
        return {"best": {"1": [score], "0.7": [score + 1, score], "0.4": [score], "0": [score]}}

    lines = {
        f"tune dpo {i} {seed}": line(score)
        for i, scores in enumerate(((5.0, 5.0), (7.0, 2.0), (6.0, 5.0), (4.0, 4.0)))
        for seed, score in zip(FULL.tuning, scores, strict=True)
    }
    assert Plan(few, lines).chosen("dpo") == (2, 0.7), "the best mean over both worlds, with its temperature"
    lines["main dpo 0 1"] = line(9.0)
    assert Plan(few, lines).chosen("dpo") == (2, 0.7), "scores of the worlds that figures come from choose nothing"
    del lines["tune dpo 3 100"]
    assert Plan(few, lines).chosen("dpo") is None, "nothing is chosen before all trials are there"


def test_a_difference_knows_what_is_certain() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 1, 40) for _ in range(5)]
    clear = difference([(list(one + 1), list(one)) for one in noise])
    assert (round(clear.mean, 6), clear.ahead, clear.above(0), clear.above(2)) == (1.0, 5, "holds", "fails")
    unsure = difference([(list(one), list(rng.normal(0, 1, 40))) for one in noise])
    assert unsure.low < unsure.mean < unsure.high
    assert (unsure.above(0), unsure.above(-3)) == ("open", "holds")
    # worlds that disagree make the interval wide, however many prompts there are
    apart = difference([([v] * 1000, [0.0] * 1000) for v in (-2.0, 1.0, 1.0, 1.0, 1.0)])
    assert apart.low < 0 < apart.high
    assert apart.ahead == 4


def test_a_frontier_is_the_upper_hull_and_keeps_its_best_score() -> None:
    points = [(0.0, 2.0), (1.0, 4.0), (2.0, 4.5), (1.5, 3.0), (3.0, 4.0)]
    assert hull(points) == [(0.0, 2.0), (1.0, 4.0), (2.0, 4.5)]
    assert area(points, 1.0) == pytest.approx(3.0, abs=1e-3)
    assert area(points, 4.0) == pytest.approx((3.0 + 4.25 + 4.5 + 4.5) / 4, abs=1e-3)


def test_a_policy_is_asked_for_goals_and_scales_as_its_arm_says(tmp_path: Path) -> None:
    lab = world(tmp_path, 0, TINY)
    _, plain = fit(lab, ARMS["dpo"], Trial(5e-2, 0.5), 4, 4, seed=0)
    _, strong = fit(lab, ARMS["strength+best"], Trial(5e-2, 0.5), 4, 4, seed=0)
    _, text = fit(lab, ARMS["text"], Trial(5e-2, 0.5), 4, 4, seed=0)
    assert (plain.at(10).strength, plain.at(10).text) == (None, None)
    assert (strong.at(10).strength, strong.at(1).strength, strong.at(10).text) == (1.0, -1.0, None)
    assert text.at(7).text is not None
    assert text.at(7).strength is None
    pairs = [(row["prompt"], row["chosen"][-1]["content"]) for row in lab.pairs]
    for asker in (plain, strong):
        own = asker.logps(pairs, asker.at(10))
        assert own == pytest.approx(asker.logps(pairs, asker.scaled(1.0)), abs=1e-4)
        base = asker.logps(pairs, BASE)
        assert max(abs(a - b) for a, b in zip(own, base, strict=True)) > 0.01, "it has learned something"
        with asker.policy.model.disable_adapter():
            assert base == pytest.approx(asker.logps(pairs, asker.at(10)), abs=1e-4)
    # by another road: one sequence at a time through the model itself
    prompt, response = pairs[0]
    ids = strong.ids(prompt, strong.at(10))
    answer = strong.encoder.tokenizer(response, add_special_tokens=False)["input_ids"]
    answer = [*answer, strong.encoder.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = strong.policy.model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    by_hand = sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
    assert strong.logps(pairs[:1], strong.at(10))[0] == pytest.approx(by_hand, abs=1e-4)


def test_reading_pairs_set_the_easiest_against_the_hardest(tmp_path: Path) -> None:
    easy, middle = (
        "The cat sat on the mat and it ate a big rat. " * 2,
        "A feline animal rested quietly on carpets. " * 3,
    )
    hard = "Domesticated felines habitually reposition themselves upon rectangular upholstery. " * 2
    row = {"prompt": "Explain cats.", "completions": [{"response": text} for text in (middle, hard, easy, "Short.")]}
    (tmp_path / "scored.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Explain dogs."}) + "\n")
    lab = reading(tmp_path, tmp_path, tmp_path / "scored.jsonl", tmp_path / "prompts.jsonl")
    pairs = [json.loads(line) for line in lab.train.read_text().splitlines()]
    assert [pair["chosen"] for pair in pairs] == [easy, middle]
    assert all(pair["score_chosen"] >= pair["score_rejected"] for pair in pairs)
    assert lab.prompts == ["Explain dogs."]
