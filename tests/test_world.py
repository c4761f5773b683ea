"""The embedded world: its rule can be checked by hand, its data are what they claim, the quickstart runs through it."""

import doctest
import json
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from conftest import ROOT, pair_of
from rap_lightning import cli
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.world import make_pairs, make_prompts, make_world, score
from rap_lightning.world.data import GOAL_MESSAGE


@pytest.mark.parametrize("module", ["world.rule", "preferences.goals"])
def test_the_examples_in_the_docs_are_true(module: str) -> None:
    result = doctest.testmod(import_module(f"rap_lightning.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_rule_rewards_each_virtue() -> None:
    asked = "List 4 fruits in alphabetical order."
    best = "apple, banana, cherry, fig"
    worse = ["apple, banana, cherry, tiger", "apple, apple, cherry, fig", "apple, banana", "fig, cherry, banana, apple"]
    assert score(asked, best) == 10.0
    for response in worse:
        assert 1.0 < score(asked, response) < 10.0
    for garbage in ("", ",,,", "\x00", "🍎" * 50):
        assert score(asked, garbage) == 1.0


def test_pairs_are_scored_by_the_rule_with_rare_top_scores_good_losers_and_bad_winners() -> None:
    train, test = make_prompts(0)
    assert not set(train) & set(test)
    pairs = make_pairs(train, 1000, 0)
    assert pairs == make_pairs(train, 1000, 0)
    assert pairs != make_pairs(train, 1000, 1)
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert pair[f"score_{side}"] == score(pair["prompt"], pair[side][-1]["content"])  # type: ignore[literal-required]
        assert pair["score_chosen"] >= pair["score_rejected"]
    usable = [pair_of(pair) for pair in pairs if pair["score_chosen"] > pair["score_rejected"]]
    assert len(usable) > 800
    scores = Counter(reward for pair in usable for reward in pair.rewards)
    assert 0 < scores[10.0] / sum(scores.values()) < 0.1
    assert sum(pair.rewards[1] >= 6 for pair in usable) > 50, "good responses that lost"
    assert sum(pair.rewards[0] <= 4 for pair in usable) > 50, "bad responses that won"


def test_the_base_saw_the_goal_text_that_training_uses() -> None:
    assert GOAL_MESSAGE.format(goal=7.5) == OverallGoal().text(7.5)
    assert GOAL_MESSAGE.format(goal=8.0) == OverallGoal().text(8.0)


def test_the_quickstart_runs_and_prints_the_steering_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shipped config with a smaller world: every part of the real one, in seconds."""
    monkeypatch.chdir(tmp_path)
    small = ["--data.base_steps", "30", "--data.train_pairs", "80", "--data.test_pairs", "20"]
    quick = ["--trainer.max_epochs", "1", "--model.generation.max_new_tokens", "8"]
    arguments = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *small, *quick]
    monkeypatch.setattr(sys, "argv", ["rap-lightning", *arguments])
    cli.main()
    printed = capfd.readouterr().out
    for text in ("Asked for a score", "before", "after", "8.5", "The samples answer:"):
        assert text in printed
    assert (tmp_path / "runs/version_0/hf/model.safetensors").is_file()
    world = json.loads((tmp_path / "runs/world/world.json").read_text())
    assert world["settings"]["base_steps"] == 30
    settings = {"train_pairs": 80, "test_pairs": 20, "base_steps": 30}
    make_world(tmp_path / "runs/world", **settings)  # found, not made again
    assert "is there already" in capfd.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        make_world(tmp_path / "runs/world", **(settings | {"seed": 1}))
