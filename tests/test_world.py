"""The embedded world: its rule can be checked by hand, its data are what they claim, the quickstart runs through it."""

import doctest
import json
import runpy
import shlex
import sys
from collections import Counter
from importlib import import_module
from inspect import signature
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import correlation, fmean, stdev
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from conftest import ROOT, called, pair_of, read_jsonl
from rap_lightning.cli import main as cli
from rap_lightning.errors import DataError
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.world import attributes, make, make_pairs, make_prompts, make_world, score
from rap_lightning.world.make import pair_figures
from rap_lightning.world.rule import FAMILIES, WORDS, parse_prompt
from rap_lightning.world.world_data import GOAL_MESSAGE, STRAYS, WorldPair, respond
from rap_lightning.world.world_datamodule import WorldDataModule


def test_the_rules_examples_are_true() -> None:
    result = doctest.testmod(import_module("rap_lightning.world.rule"))
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


@pytest.mark.parametrize(
    ("knob", "values", "share"),
    [
        ("lean", (-0.5, 0.3, 2.0), "top_scores"),
        ("lean", (-0.5, 0.3, 2.0), "good_losers"),
        ("best", (1.0, 0.85, 0.7, 0.5), "top_scores"),
        ("contrast", (0.0, 0.3, 0.6, 1.0), "good_losers"),
        ("contrast", (0.0, 0.6, 1.0), "bad_winners"),
    ],
)
def test_each_knob_moves_its_share(knob: str, values: tuple[float, ...], share: str) -> None:
    train, _ = make_prompts(0)
    shares = [pair_figures(make_pairs(train, 3000, 0, **{knob: value}))[share] for value in values]  # type: ignore[arg-type]
    for more, less in pairwise(shares):
        assert less < 0.9 * more  # type: ignore[operator]


def test_a_noisy_judge_is_off_by_as_much_as_asked_and_still_says_who_won() -> None:
    train, _ = make_prompts(0)
    clean, noisy = make_pairs(train, 3000, 0), make_pairs(train, 3000, 0, judge_noise=2.0)
    errors, parts = [], []
    for pair in noisy:
        assert pair["score_chosen"] >= pair["score_rejected"]
        for side in ("chosen", "rejected"):
            true = score(pair["prompt"], pair[side][-1]["content"])  # type: ignore[literal-required]
            if 4 <= true <= 7:  # elsewhere the scale's ends cut the noise
                errors.append(pair[f"score_{side}"] - true)  # type: ignore[literal-required]
                exact = attributes(pair["prompt"], pair[side][-1]["content"])  # type: ignore[literal-required]
                parts.append(pair[f"scores_{side}"]["order"] - exact["order"])  # type: ignore[literal-required]
    assert len(errors) > 1000
    assert 1.8 < stdev(errors) < 2.1
    assert abs(fmean(errors)) < 0.15
    assert correlation(errors, parts) < 0.1, "each number has noise of its own"

    def texts(pairs: list[WorldPair]) -> list[set[str]]:
        return [{pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]} for pair in pairs]

    assert texts(noisy) == texts(clean), "noise changes scores, never responses"


def test_pairs_without_noise_carry_the_rules_attributes() -> None:
    train, _ = make_prompts(0)
    for pair in make_pairs(train, 50, 0):
        assert pair["scores_rejected"] == attributes(pair["prompt"], pair["rejected"][-1]["content"])


def test_as_many_pairs_as_asked_are_the_models_own() -> None:
    train, _ = make_prompts(0)
    calls: list[str] = []

    def sample(prompts: list[str]) -> list[str]:
        calls.extend(prompts)
        return [f"own {i}" for i in range(len(prompts))]

    pairs = make_pairs(train, 1000, 0, on_policy=0.3, sample=sample)
    own = [p for p in pairs if p["chosen"][-1]["content"].startswith("own")]
    assert all(p["rejected"][-1]["content"].startswith("own") for p in own)
    assert 250 < len(own) < 350
    assert calls == [p["prompt"] for p in own for _ in range(2)]
    for pair, without in zip(pairs, make_pairs(train, 1000, 0), strict=True):
        assert pair in own or pair == without, "the other pairs stay as they were"
    with pytest.raises(ValueError, match="pass sample"):
        make_pairs(train, 10, 0, on_policy=0.3)


def test_four_families_have_their_prompts_and_perfect_answers() -> None:
    counts = {}
    for family in FAMILIES:
        train, test = make_prompts(0, families=[family])
        counts[family] = len(train) + len(test)
        prompt = train[0]
        assert parse_prompt(prompt).family == family
        perfect = respond(prompt, 1.0, Random(0))
        assert score(prompt, perfect) == 10.0
        backwards = ", ".join(reversed(perfect.split(", ")))
        assert score(prompt, backwards) < 10.0
    assert counts == {"words": 144, "numbers": 48, "words-backwards": 144, "numbers-backwards": 48}
    with pytest.raises(ValueError, match="different names"):
        make_prompts(0, families=["letters"])


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("lean", -1.0),
        ("best", 1.1),
        ("contrast", -0.1),
        ("judge_noise", -1.0),
        ("on_policy", 2.0),
        ("goal_share", 1.5),
        ("habit", 1.5),
    ],
)
def test_a_knob_out_of_range_is_refused_before_anything_is_made(knob: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=knob):
        make_world(tmp_path / "world", **{knob: value})  # type: ignore[arg-type]
    assert not (tmp_path / "world").exists()


def run_module(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Run ``python -m MODULE ...`` in this process."""
    monkeypatch.setattr(sys, "argv", command[2:])
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)


def test_a_world_of_the_models_own_pairs_is_made_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--base_steps", "20", "--train_pairs", "60", "--test_pairs", "10", "--goal_share", "0"]
    knobs = ["--on_policy", "1", "--judge_noise", "1", "--families", "[words-backwards]"]
    command = ["python", "-m", "rap_lightning.world", str(tmp_path / "world"), *small, *knobs]
    run_module(monkeypatch, command)
    record = json.loads((tmp_path / "world/world.json").read_text())
    assert record["settings"]["families"] == ["words-backwards"]
    pairs = read_jsonl(tmp_path / "world/train.jsonl")
    assert all("reverse alphabetical" in pair["prompt"] for pair in pairs)
    # a base of 20 steps writes nothing like the generator's lists
    known = {word for words in WORDS.values() for word in words} | set(STRAYS)
    strange = sum(not set(pair["chosen"][-1]["content"].split(", ")) <= known for pair in pairs)
    assert strange > len(pairs) / 2
    with pytest.raises(SystemExit, match=r"error: .*on_policy must be from 0 to 1"):
        run_module(monkeypatch, [*command, "--on_policy", "7"])


def test_another_world_in_the_folder_is_told_by_what_differs_and_the_flags_that_take_it(tmp_path: Path) -> None:
    defaults = {
        name: parameter.default for name, parameter in signature(make_world).parameters.items() if name != "root"
    }
    settings = defaults | {"version": 2, "seed": 1, "families": ["words"]}
    (tmp_path / "world.json").write_text(json.dumps({"settings": settings}))
    module = WorldDataModule(str(tmp_path))
    with pytest.raises(DataError) as caught:
        module.prepare_data()
    said = str(caught.value)
    assert "seed is 1 there, requested 0" in said
    assert "--data.families '[words]' --data.world_seed 1)" in said
    assert "base_steps" not in said, "it is the same"
    parser = ArgumentParser()
    parser.add_class_arguments(WorldDataModule, "data", fail_untyped=False)
    flags = shlex.split(said[said.index("--data.families") : said.index("), or choose")])
    given = parser.parse_args([*flags, "--data.source", str(tmp_path)]).data
    assert (given.families, given.world_seed) == (["words"], 1)


def test_a_world_that_another_host_makes_meanwhile_on_a_shared_disk_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"train_pairs": 20, "test_pairs": 10, "base_steps": 2}
    fill, root = make._fill, tmp_path / "world"

    def both(folder: Path, settings: Any) -> Any:
        monkeypatch.setattr(make, "_fill", fill)
        make_world(root, **small)
        return fill(folder, settings)

    monkeypatch.setattr(make, "_fill", both)
    make_world(root, **small)
    assert "another process has made" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["world"], "nothing is left beside it"


def test_plan_says_how_to_make_the_quickstarts_model_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"base_steps": 5, "train_pairs": 20, "test_pairs": 10}
    flags = [part for name, value in small.items() for part in (f"--data.{name}", str(value))]
    plan = ["plan", "--config", ROOT / "configs/quickstart.yaml", *flags]
    assert called(*plan) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: --model.policy.path runs/world/base isn't there yet. fit makes it")
    command = said.strip().rpartition(": ")[2]
    assert command == "python -m rap_lightning.world runs/world --train_pairs 20 --test_pairs 10 --base_steps 5"
    run_module(monkeypatch, shlex.split(command))
    assert called(*plan) == 0


def test_the_base_saw_the_goal_text_that_training_uses() -> None:
    assert GOAL_MESSAGE.format(goal=7.5) == OverallGoal().text(7.5)
    assert GOAL_MESSAGE.format(goal=8.0) == OverallGoal().text(8.0)


def test_the_quickstart_runs_and_prints_the_steering_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shipped config with a smaller world: every part of the real one, in seconds."""
    monkeypatch.chdir(tmp_path)
    small = ["--data.base_steps", "30", "--data.train_pairs", "80", "--data.test_pairs", "20"]
    quick = ["--trainer.max_steps", "4", "--model.generation.max_new_tokens", "8"]
    arguments = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *small, *quick]
    monkeypatch.setattr(sys, "argv", ["rap-lightning", *arguments])
    cli.main()
    printed = capfd.readouterr().out
    for text in ("Mean score at each goal", "before", "after", "8.5", "Prompt for the samples:"):
        assert text in printed
    assert (tmp_path / "runs/version_0/hf/adapter_model.safetensors").is_file()
    record = json.loads((tmp_path / "runs/version_0/steering.json").read_text())
    assert [record["goals"][0], record["goals"][-1], len(record["rows"])] == [1, 10, 7]
    for row in record["rows"]:
        assert row["score"] == score(row["prompt"], row["response"])
        assert f"{row['before']['mean']:.2f}" in printed
    # the other arm's run, with this one beside it, as `make demo` shows two
    overlay = ["--config", str(ROOT / "configs/plain-dpo.yaml"), "--trainer.callbacks.beside", "runs/version_0"]
    run = [*arguments[:3], *overlay, *arguments[3:], "--trainer.default_root_dir", "runs/dpo"]
    monkeypatch.setattr(sys, "argv", ["rap-lightning", *run])
    cli.main()
    printed = capfd.readouterr().out
    ours = json.loads((tmp_path / "runs/dpo/version_0/steering.json").read_text())
    assert [row["prompt"] for row in ours["rows"]] == [row["prompt"] for row in record["rows"]], "one world, one seed"
    assert "a sample of version_0" in printed
    assert f"{record['rows'][3]['after']['mean']:.2f}" in printed
    monkeypatch.setattr(sys, "argv", ["rap-lightning", *run, "--trainer.callbacks.samples", "95"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "was sampled with" in capfd.readouterr().err
    world = json.loads((tmp_path / "runs/world/world.json").read_text())
    assert world["settings"]["base_steps"] == 30
    settings = {"train_pairs": 80, "test_pairs": 20, "base_steps": 30}
    make_world(tmp_path / "runs/world", **settings)  # found, not made again
    assert "exists already" in capfd.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        make_world(tmp_path / "runs/world", **(settings | {"seed": 1}))
