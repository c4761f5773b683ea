"""The study of docs/study: its short version runs and goes on where it was killed, its numbers are what they claim."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT))
from benchmarks.study import laboratory
from benchmarks.study.__main__ import main, read
from benchmarks.study.arms import ARMS, Trial
from benchmarks.study.judges import CONSTRAINTS, TASKS, constraints, reading_ease, sentiment
from benchmarks.study.laboratory import _topics, make, pair, prepare, world
from benchmarks.study.report import write
from benchmarks.study.run import BASE, fit
from benchmarks.study.schedule import Plan
from benchmarks.study.settings import FULL, REAL, SHORT, Size
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


@pytest.mark.parametrize("task", [None, "reading"])
def test_the_tables_of_the_page_are_those_of_its_results(tmp_path: Path, task: str | None) -> None:
    pytest.importorskip("matplotlib")
    size = FULL if task is None else replace(REAL, task=task)
    page, results = f"{task or 'README'}.md", f"{task or 'results'}.jsonl"
    shutil.copy(ROOT / "docs/study" / page, tmp_path)
    write(tmp_path, read(ROOT / "docs/study" / results), size)
    assert (tmp_path / page).read_text() == (ROOT / "docs/study" / page).read_text()
    assert (tmp_path / f"{task or 'goals'}.png").stat().st_size > 5000


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


def test_pairs_set_the_best_response_against_the_worst() -> None:
    rows = pair("Why?", [(3.0, "c"), (1.0, "a"), (4.5, "d"), (2.0, "b"), (9.0, "e")])
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("e", "a"), ("d", "b")]
    assert rows[0] == {"prompt": "Why?", "chosen": "e", "rejected": "a", "score_chosen": 9.0, "score_rejected": 1.0}


def test_simple_words_in_short_sentences_read_easily() -> None:
    easy = "The cat sat on the mat and it ate a big rat. " * 2
    middle = "A feline animal rested quietly on carpets. " * 3
    hard = "Domesticated felines habitually reposition themselves upon rectangular upholstery. " * 2
    scores = [reading_ease("", text) for text in (easy, middle, hard)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 10.0
    # 21 words in 3 sentences; syllables by hand: a fe-line an-i-mal rest-ed qui-et-ly on car-pets: 14 groups of vowels
    by_formula = 206.835 - 1.015 * 7 - 84.6 * 13 / 7
    assert scores[1] == pytest.approx(1 + 9 * by_formula / 100)


@pytest.mark.parametrize("text", CONSTRAINTS)
def test_a_constraint_is_met_by_a_response_that_meets_it_and_by_no_other(text: str) -> None:
    met = {
        "Use fewer than 25 words.": "Candles give light when it is dark and the lamp fails.",
        "Write exactly two sentences.": "Candles give light when it is dark. They are made of wax.",
        "Do not use commas.": "Candles give light when it is dark and the lamp fails.",
        "Use the word today.": "Candles, which are of wax, give less light today than lamps.",
        "Start with the word Well.": "Well, candles give light when it is dark, and lamps fail.",
        "End with a question.": "Candles give light when it is dark, but who needs them?",
    }[text]
    missed = {
        "Use fewer than 25 words.": "Candles give light when it is dark. " * 4,
        "Write exactly two sentences.": "Candles give light when it is dark. They are of wax. They burn",
        "Do not use commas.": "Candles, which are made of wax, give light.",
        "Use the word today.": "Candles are for those who think that todays are dark.",
        "Start with the word Well.": "Candles serve me well when it is dark. Well!",
        "End with a question.": "Who needs candles when it is dark? The lamps fail.",
    }[text]
    assert [constraints(f"Say something. {text}", response) for response in (met, missed)] == [10.0, 1.0]
    assert constraints(f"Say something. {text}", "Well, today?") == 1.0, "too short to count"


def test_sentiment_is_vaders_compound_score() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad = (f"The {word} days by the sea were {word}, and all of us said so on the way home." for word in
                 ("wonderful", "horrible"))  # fmt: skip
    plain = "The train leaves at nine and arrives at ten, and there are four stations on the way."
    assert 1 < sentiment("", bad) < 4 < sentiment("", plain) < 7 < sentiment("", good) < 10
    assert sentiment("", plain) == 5.5
    assert sentiment("", "Wonderful!") == 1.0


def test_a_real_model_is_tuned_on_prompts_that_no_figure_and_no_training_uses(tmp_path: Path) -> None:
    (tmp_path / "reading").mkdir()
    rows = pair("Explain cats.", [(3.0, "a"), (8.0, "b")])
    (tmp_path / "reading" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = replace(REAL, task="reading", model="a-model")
    tuning, figures = (make(tmp_path, seed, size) for seed in (REAL.tuning[0], REAL.seeds[0]))
    assert (len(tuning.prompts), len(figures.prompts)) == (24, 40)
    asked = {TASKS["reading"].ask(topic) for topic in _topics()[0]}
    assert not set(tuning.prompts) & set(figures.prompts)
    assert not asked & {*tuning.prompts, *figures.prompts}
    assert figures.neutral == 5.5, "the mean score of the training responses"


def test_a_real_models_own_responses_become_pairs_that_an_arm_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world(tmp_path, 0, TINY).base
    monkeypatch.setattr(laboratory, "_topics", lambda: (["apples", "ink"], ["fog"], ["moss"]))
    prepare(tmp_path, "constraints", base)
    rows = [json.loads(line) for line in (tmp_path / "constraints" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3, "six responses to each of two prompts"
    assert all(row["score_chosen"] == constraints(row["prompt"], row["chosen"]) for row in rows)
    lab = make(tmp_path, 1, replace(REAL, task="constraints", model=base))
    assert [prompt.partition(".")[0] for prompt in lab.prompts] == ["Say something about moss"]
    answers = [(1.0, "fig"), (9.0, "plum, fig")]  # an untrained model's may all tie
    rows = [row for i in range(4) for row in pair(f"Say {i}.", answers)]
    (tmp_path / "constraints" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, asker = fit(lab, ARMS["strength+soft"], Trial(1e-3, 0.1), 1, 2, seed=1)
    assert len(asker.samples(lab, asker.at(10), 1, 1.0, seed=0)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "reading"], "--task and --model go together"),
        (["--model", "M"], "--task and --model go together"),
        (["--task", "reading", "--model", "M", "--short"], "a task has no short study"),
        (["--report", "--arms", "dpo"], "--arms has no effect with --report"),
        (["--report", "--task", "reading", "--model", "M"], "--model has no effect with --report"),
    ],
)
def test_options_without_effect_are_refused(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert said in capsys.readouterr().err
