"""rounds: every stage a file that is done once, used as it is edited, and resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT, called, read_jsonl, write_jsonl
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy import round_fit
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.stages import Stages
from rap_lightning.preferences.template_options import TemplateOptions
from rap_lightning.world.make import make_world
from rap_lightning.world.world_data import make_prompts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose base model has hardly been trained."""
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, train_pairs=200, test_pairs=40, base_steps=60)
    return folder


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Path:
    train, test = make_prompts(0)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in train[:12]])
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": prompt} for prompt in test[:6]])
    options = {
        "prompts": str(tmp_path / "prompts.jsonl"), "held_out": str(tmp_path / "held_out.jsonl"),
        "model": str(world / "base"), "output": str(tmp_path / "rounds"), "rounds": 1, "samples": 4,
        "max_new_tokens": 24,
        "judge": {"class_path": "Function", "init_args": {"function": "rap_lightning.world.rule.score"}},
        "goal": {"class_path": "OverallGoal", "init_args": {"scale": {"class_path": "LinearScale"}}},
        "fit": {
            "model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
            "data": {"max_length": 128, "batch_size": 8},
            "trainer": {"accelerator": "cpu", "max_steps": 3},
        },
    }  # fmt: skip
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def changed(config: Path, **values: Any) -> None:
    options = yaml.safe_load(config.read_text())
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            options[section][key] = value
        else:
            options[section] = value
    config.write_text(yaml.safe_dump(options))


def times(folder: Path) -> dict[str, int]:
    names = ["samples.jsonl", "scored.jsonl", "pairs.jsonl", "goal.yaml", "relabelled.parquet", "fit.yaml"]
    return {name: (folder / name).stat().st_mtime_ns for name in names}


@pytest.mark.usefixtures("commands_in_process")
def test_a_round_is_files_that_are_made_once_and_used_as_they_are_edited(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    assert called("rounds", "--config", config) == 0
    folder = tmp_path / "rounds" / "round-1"
    assert len(read_jsonl(folder / "samples.jsonl")) == 48
    scored = read_jsonl(folder / "scored.jsonl")
    assert len(scored) == 12
    assert len(scored[0]["completions"]) == 4
    goal = yaml.safe_load((folder / "goal.yaml").read_text())
    rewards = [c["overall_score"] for row in scored for c in row["completions"]]
    fitted = goal["goal"]["init_args"]["scale"]["init_args"]
    assert (fitted["judge_low"], fitted["judge_high"]) == (min(rewards), max(rewards))
    pairs = read_jsonl(folder / "pairs.jsonl")
    view = pq.read_table(folder / "relabelled.parquet").to_pylist()
    assert len(view) == 2 * len(pairs)
    assert "target scores" in view[0]["prompt"][0]["content"]
    assert (folder / "model" / "model.safetensors").is_file()
    record = json.loads((folder / "model" / "goal.json").read_text())
    assert record["scale"]["judge_high"] == max(rewards), "fit trained at the round's own scale"
    (summary,) = json.loads((tmp_path / "rounds" / "rounds.json").read_text())
    assert [one["model"] for one in summary["held_out"]] == ["before", "round 1"]
    assert summary["held_out"][0]["count"] == 6

    made = times(folder)
    capsys.readouterr()
    assert called("rounds", "--config", config) == 0
    assert times(folder) == made, "nothing is done twice"

    for row in scored:  # by hand: another judgement of one response, the same for all others
        row["completions"][0]["overall_score"] = 10.0
    write_jsonl(folder / "scored.jsonl", scored)
    capsys.readouterr()
    assert called("rounds", "--config", config) == 0
    shown = capsys.readouterr().out
    assert "score was changed by hand, and is used as it is" in shown
    assert "select is done again" in shown
    assert read_jsonl(folder / "scored.jsonl") == scored
    assert times(folder)["samples.jsonl"] == made["samples.jsonl"]
    again = read_jsonl(folder / "pairs.jsonl")
    assert again != pairs
    assert read_jsonl(folder / "old" / "select-1" / "pairs.jsonl") == pairs, "nothing is deleted"
    assert (folder / "old" / "fit-1" / "model").is_symlink()

    goal["relabel"] = "chosen"
    (folder / "goal.yaml").write_text(yaml.safe_dump(goal))
    assert called("rounds", "--config", config) == 0
    assert "relabel was changed by hand, and is used as it is" in capsys.readouterr().out
    apart = [pair for pair in again if pair["score_rejected"] < fitted["judge_high"]]  # the others' goals read the same
    assert 0 < pq.read_table(folder / "relabelled.parquet").num_rows == len(apart)
    assert yaml.safe_load((folder / "fit.yaml").read_text())["data"]["relabel"] == "chosen"

    (folder / "relabelled.parquet").write_bytes(b"something else")
    assert called("rounds", "--config", config) == 2
    assert "only shows what pairs.jsonl and goal.yaml make" in capsys.readouterr().err


@pytest.mark.usefixtures("commands_in_process")
def test_the_view_is_made_again_when_fit_draws_with_another_seed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(config, relabel="half", held_out=None)
    folder = tmp_path / "rounds" / "round-1"
    assert called("rounds", "--config", config) == 0
    first = (folder / "relabelled.parquet").read_bytes()
    options = yaml.safe_load(config.read_text())
    options["fit"]["data"]["seed"] = 7
    config.write_text(yaml.safe_dump(options))
    capsys.readouterr()
    assert called("rounds", "--config", config) == 0
    shown = capsys.readouterr().out
    assert "view is done again" in shown
    assert "generate is done again" not in shown
    assert (folder / "relabelled.parquet").read_bytes() != first


def test_a_model_asked_through_another_template_is_another_input(world: Path) -> None:
    base = str(world / "base")
    same, switched, named = (
        ModelSource(base, template=TemplateOptions(name, kwargs)).identity()
        for name, kwargs in ((None, {}), (None, {"enable_thinking": False}), ("tools", {}))
    )
    assert same == ModelSource(base).identity()
    assert len({json.dumps(one) for one in (same, switched, named)}) == 3


@pytest.mark.usefixtures("commands_in_process")
def test_a_round_whose_scores_are_all_tied_says_so_and_keeps_what_is_finished(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(config, judge={"class_path": "Function", "init_args": {"function": "test_rounds.always_five"}})
    assert called("rounds", "--config", config) == 2
    error = capsys.readouterr().err
    assert "all rewards are the same" in error
    assert "What is finished is kept" in error
    assert len(read_jsonl(tmp_path / "rounds" / "round-1" / "scored.jsonl")) == 12
    changed(
        config, judge={"class_path": "Function", "init_args": {"function": "test_rounds.by_prompt"}},
        goal={"class_path": "OverallGoal"},
    )  # fmt: skip
    assert called("rounds", "--config", config) == 2
    captured = capsys.readouterr()
    assert "score is done again: what it is made of has changed" in captured.out
    assert "No two responses to a prompt have goals that differ" in captured.err
    assert len(list((tmp_path / "rounds" / "round-1" / "old").glob("score-*"))) == 1


def always_five(prompt: str, response: str) -> float:
    return 5.0


def by_prompt(prompt: str, response: str) -> float:
    return float(len(prompt) % 5 + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fit__model": {"policy": {"path": "x"}}}, "fit.model.policy.path has no effect"),
        ({"fit__data": {"source": "x"}}, "fit.data.source has no effect"),
        ({"fit__trainer": {"default_root_dir": "x"}}, "default_root_dir has no effect"),
        ({"fit__trainer": {"max_stepps": 3}}, "refused by rap-lightning fit"),
        ({"scale": "keep"}, "no effect with one round"),
        ({"held_out": None, "held_out_limit": 3}, "no effect without held_out"),
        ({"rounds": 0}, "at least 1"),
        ({"parts": 13}, "from 1 to the number of prompts, 12"),
        ({"temperature": 0}, "a temperature above 0"),
        ({"judge": {"class_path": "Functoin"}}, "Functoin"),
    ],
)
@pytest.mark.usefixtures("commands_in_process")
def test_what_makes_no_sense_is_refused_before_anything_is_sampled(
    changes: dict[str, Any], said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(config, **changes)
    assert called("rounds", "--config", config) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "rounds" / "round-1" / "samples.jsonl").exists()


def test_held_out_prompts_are_not_trained_on(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(config, held_out=str(tmp_path / "prompts.jsonl"))
    assert called("rounds", "--config", config) == 2
    assert "12 of the held-out prompts are among those" in capsys.readouterr().err


def test_the_reference_is_the_policy_or_the_initial_model(tmp_path: Path) -> None:
    made = round_fit.fit_config({}, "latest", "first", tmp_path / "p", {"goal": None}, tmp_path / "r", "initial")
    assert made["model"]["policy"]["path"] == "latest"
    assert made["model"]["reference"] == {"class_path": "Frozen", "init_args": {"path": "first"}}
    made = round_fit.fit_config(
        {"model": {"policy": {"lora": {"r": 4}}}, "data": {"class_path": "my.Data", "init_args": {"batch_size": 2}}},
        "latest", "first", tmp_path / "p", {"goal": None}, tmp_path / "r", "policy",
    )  # fmt: skip
    assert "reference" not in made["model"]
    assert made["export"] == {"merge": True}, "the next round's policy is a whole model"
    assert made["data"]["init_args"]["source"] == str((tmp_path / "p").resolve())
    with pytest.raises(ConfigError, match="beside reference initial"):
        round_fit.fit_config({"model": {"reference": "Frozen"}}, "a", "b", tmp_path, {}, tmp_path, "initial")


def test_a_stage_that_was_interrupted_goes_on_and_one_of_other_inputs_begins_anew(tmp_path: Path) -> None:
    stages = Stages(tmp_path, "round 1")

    def half() -> None:
        (tmp_path / "out").write_text("half")
        raise DataError("killed")

    def rest() -> None:
        path = tmp_path / "out"
        path.write_text((path.read_text() if path.exists() else "") + " whole")

    with pytest.raises(DataError):
        stages.run("one", "a", ["out"], half)
    Stages(tmp_path, "round 1").run("one", "a", ["out"], rest)
    assert (tmp_path / "out").read_text() == "half whole"
    with pytest.raises(DataError):
        Stages(tmp_path, "round 1").run("one", "b", ["out"], half)
    Stages(tmp_path, "round 1").run("one", "c", ["out"], rest)
    assert (tmp_path / "out").read_text() == " whole"
    assert [(p.name, (p / "out").read_text()) for p in sorted((tmp_path / "old").iterdir())] == [
        ("one-1", "half whole"), ("one-2", "half")
    ]  # fmt: skip
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Stages(tmp_path, "round 1")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "rounds").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("commands_in_process")
def test_every_recipe_is_read_and_its_fit_section_is_taken_by_fit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rap_lightning.onpolicy import prompt_set
    from rap_lightning.onpolicy import run_rounds as rounds
    from rap_lightning.onpolicy.model_source import ModelSource

    plans: list[Any] = []
    names = iter(range(10))
    monkeypatch.setattr(rounds, "run_rounds", lambda plan: plans.append(plan) or [])
    found = lambda *args: prompt_set.PromptSet([[{"role": "user", "content": f"hi {next(names)}"}]])  # noqa: E731
    monkeypatch.setattr(prompt_set, "read_prompts", found)
    assert called("rounds", "--config", recipe, "--output", tmp_path) == 0
    assert recipe.read_text().startswith(f"# rap-lightning rounds --config configs/rounds/{recipe.name}\n")
    (plan,) = plans
    rounds.Round(plan, 1, ModelSource(plan.initial.path)).check_fit()


@pytest.mark.slow
def test_rounds_killed_anywhere_end_as_rounds_that_were_not(config: Path, tmp_path: Path) -> None:
    """Two rounds, the scale kept; killed with SIGKILL every few seconds."""
    changed(config, rounds=2, scale="keep", fit__trainer={"accelerator": "cpu", "max_steps": 3})
    assert called("rounds", "--config", config) == 0
    whole = tmp_path / "rounds"
    shutil.move(whole, tmp_path / "whole")
    command = [sys.executable, "-m", "rap_lightning.cli.main", "rounds", "--config", str(config)]
    for patience in [7, 9, 11, 13, 15, 400]:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0)
        try:
            output, _ = run.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            import os
            import signal

            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            continue
        assert run.returncode == 0, output.decode()
        break
    for number in (1, 2):
        for name in ("scored.jsonl", "pairs.jsonl", "goal.yaml"):
            one, other = (root / f"round-{number}" / name for root in (whole, tmp_path / "whole"))
            assert one.read_bytes() == other.read_bytes(), (number, name)
        weights = [
            (root / f"round-{number}" / "model" / "model.safetensors").read_bytes()
            for root in (whole, tmp_path / "whole")
        ]
        assert weights[0] == weights[1]
    first, second = (yaml.safe_load((whole / f"round-{n}" / "goal.yaml").read_text())["goal"] for n in (1, 2))
    assert first == second, "the scale is kept"
    goals = {row["goal"] for row in read_jsonl(whole / "round-2" / "samples.jsonl")}
    assert goals == {"10"}, "the second round samples at the best goal"
