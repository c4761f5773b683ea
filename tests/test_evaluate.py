"""evaluate: figures by another road, and files that an interruption doesn't change."""

from __future__ import annotations

import functools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build, called, make_model, make_trainer, read_jsonl, scored_rows, sgd, write_jsonl
from rap_lightning.cli import main as cli
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.onpolicy.evaluate.recorded_run import recorded_base
from rap_lightning.onpolicy.jsonl_ledger import Ledger, line_of
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.preferences.rendering import with_goal

JUDGE = ["--judge", "Function", "--judge.function", "stub_judges.by_letters", "--judge.scale", "[1, 10]"]
FEW = ["--samples", 2, "--max_new_tokens", 6, "--engine", "Transformers", "--engine.batch_size", 8]


called = partial(called, "evaluate")


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: its base, an exported policy that moved away from it, its records."""
    folder = tmp_path_factory.mktemp("evaluate") / "version_0"
    base = make_model(folder.parent / "base")
    shutil.copytree(base, folder / "hf")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "hf")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "goal.json").write_text(json.dumps(OverallGoal().record()))
    (folder / "run.json").write_text(json.dumps({"folder": str(folder.parent)}))
    (folder / "config.yaml").write_text("model:\n  policy:\n    path: base\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate-data")
    write_jsonl(folder / "train.jsonl", scored_rows(23))
    write_jsonl(folder / "test.jsonl", scored_rows(9, seed=1) + scored_rows(3))
    return folder


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def logps_by_hand(folder: Path, history: list[dict[str, str]], goal: str | None, response: str) -> float:
    """From the chat template and the model's own logits."""
    tokenizer, model = loaded(folder)
    turns = with_goal(history, goal, "system")
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
    ids, first = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    # the newline after the end of turn is the template's own, and part of what training scores
    return float(sum(logits[i - 1, ids[i]] for i in range(len(first), len(ids))))


def test_unlearning_is_what_the_models_own_logits_say(run: Path, data: Path, tmp_path: Path) -> None:
    args = ["--model", run / "hf", "--source", data, "--parts", "[unlearning]", "--output", tmp_path, "--bins", 1]
    assert called(*args) == 0
    found = document(tmp_path)["unlearning"]
    rows = read_jsonl(data / "test.jsonl")
    text = OverallGoal().text
    changes: dict[str, list[float]] = {"none": [], "best": [], "worst": [], "own": []}
    for row in rows:
        history, response = row["rejected"][:-1], row["rejected"][-1]["content"]
        goals = {"none": None, "best": text(10), "worst": text(1), "own": text(row["score_rejected"])}
        for name, goal in goals.items():
            policy, base = (logps_by_hand(f, history, goal, response) for f in (run / "hf", run.parent / "base"))
            changes[name].append(policy - base)
    for name, values in changes.items():
        (figure,) = found["conditions"][name]["rejected"]
        assert figure["value"] == pytest.approx(np.mean(values), abs=2e-4), name
        assert figure["n"] == 12
    assert abs(np.mean(changes["best"]) - np.mean(changes["none"])) > 1e-3, "conditions differ"


def test_log_probabilities_are_the_modules(run: Path, data: Path, tmp_path: Path) -> None:
    args = ["--model", run / "hf", "--source", data, "--parts", "[unlearning]", "--output", tmp_path / "out"]
    assert called(*args, "--split", "train") == 0
    rows = read_jsonl(tmp_path / "out" / "work" / "logps.jsonl")
    by_key = {(row["pair_id"], row["goal"]): row["logps"] for row in rows}
    module, batches = build(run / "hf", data, layout="padded", keep_original=True, optimizer=sgd, max_length=512)
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, batches)
    policy = ModelSource(str(run / "hf")).load(torch.float32, "cpu")
    module.policy.model.load_state_dict(policy.state_dict())
    text, compared = OverallGoal().text, 0
    for (batch,) in batches.train_dataloader():
        with torch.no_grad():
            logps = module.policy.logps(batch).tolist()
        for i, (pair, goal) in enumerate(zip(batch.pair_ids, batch.goals, strict=True)):
            ours = by_key[pair, None if goal is None else text(float(goal))]
            swapped = int(batch.origin[i]) == 1
            assert logps[2 * i] == pytest.approx(ours[swapped], abs=1e-4)
            assert logps[2 * i + 1] == pytest.approx(ours[1 - swapped], abs=1e-4)
            compared += 1
    assert compared == 69


def test_an_obedient_model_has_a_spearman_of_1(run: Path, data: Path, tmp_path: Path) -> None:
    args = ["--model", run / "hf", "--source", data, "--output", tmp_path, "--engine", "stub_judges.Obedient"]
    args += ["--judge", "Function", "--judge.function", "stub_judges.face_value", "--judge.scale", "[1, 10]"]
    assert called(*args, "--goals", "[none, 10, 1, 4.5]") == 0
    found = document(tmp_path)
    assert found["goals"] == [1, 4.5, 10]
    for decoding in ("sampled", "greedy"):
        part = found["controllability"][decoding]
        for name in ("spearman", "spearman_samples", "slope"):
            assert part[name] == {"value": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1), "n": 12}
        assert [figure["value"] for figure in part["mean"]] == [1, 4.5, 10]
        assert part["argmax"] == {"goal": 10, "shares": [0, 0, 1]}
        assert found["without_goal"]["controllability"][decoding]["mean"]["value"] == 5
    rows = read_jsonl(data / "test.jsonl")
    best = [row["score_chosen"] for row in rows]
    known = [found["without_goal"]["extrapolation"]["best_known"], *found["extrapolation"]["best_known"]]
    assert [figure["value"] for figure in known] == pytest.approx(
        [np.mean([value >= b for b in best]) for value in (5, 1, 4.5, 10)]
    )
    assert found["extrapolation"]["best_seen"][2]["n"] == 3, "three of the prompts are in training"
    assert found["extrapolation"]["training"] == {"split": "train", "responses": 46, "prompts_seen": 3}
    assert [figure["value"] for figure in found["length"]["tokens"]] == [5.5] * 3
    assert [figure["value"] for figure in found["length"]["controlled"]] == pytest.approx([1, 4.5, 10])
    lines = read_jsonl(tmp_path / "samples.jsonl")
    assert len(lines) == 12 * 4 * (4 + 1)
    assert {(row["goal"], row["score"]) for row in lines} == {(None, 5.0), (1, 1.0), (4.5, 4.5), (10, 10.0)}


def everything(run: Path, data: Path) -> list[object]:
    args = ["--model", run / "hf", "--source", data, *JUDGE, *FEW]
    return [*args, "--token_budget", 1500, "--goals", "[1, 10]", "--scale_points", 4]


@pytest.fixture(scope="module")
def whole(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluate-whole")
    assert called(*everything(run, data), "--output", folder) == 0
    return folder


@pytest.mark.parametrize("stop_at", ["sampled", "greedy", "verdicts", "logps", "logps-base"])
def test_a_run_that_was_killed_goes_on_to_the_same_files(
    stop_at: str, whole: Path, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Ledger.append, 0

    def killed(self: Ledger, rows: Any) -> None:
        nonlocal calls
        if self.path.stem != stop_at or calls:
            return real(self, rows)
        calls += 1
        half = len(rows) // 2
        real(self, rows[:half])
        assert self._file is not None
        self._file.write(line_of(rows[half]).encode()[:20])  # as a kill leaves it
        self._file.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "append", killed)
    stopped, args = tmp_path / "stopped", everything(run, data)
    assert called(*args, "--output", stopped) == 130
    assert calls == 1
    assert not (stopped / "evaluation.json").exists()
    assert called(*args, "--output", stopped) == 0
    for name in ("samples.jsonl", "work/logps.jsonl", "work/logps-base.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (untimed(document(folder)) for folder in (stopped, whole))
    assert a == b


def untimed(found: dict[str, Any]) -> dict[str, Any]:
    """A document without how long it took."""
    del found["seconds"]
    for one in found["runs"]:
        del one["seconds"]
    return found


def found_base(path: Path) -> str:
    base = recorded_base(ModelSource(str(path)))
    assert isinstance(base, ModelSource), base
    return base.path


def test_the_base_is_the_one_that_the_run_began_with(run: Path, data: Path, tmp_path: Path) -> None:
    assert found_base(run / "hf") == str(run.parent / "base"), "found where the run was started"
    module, batches = build(run.parent / "base", data, optimizer=sgd)
    trainer = make_trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, batches)
    folder = tmp_path / "version_9" / "checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "run.json").write_text("{}")
    trainer.save_checkpoint(folder / "last.ckpt")
    assert found_base(folder / "last.ckpt") == str((run.parent / "base").resolve())
    args = ["--model", folder / "last.ckpt", "--source", data, "--parts", "[unlearning, discrimination]"]
    assert called(*args, "--scale_points", 4) == 0
    found = document(folder.parent / "evaluation")
    assert found["base"] == str((run.parent / "base").resolve())
    assert found["discrimination"]["goals"] == [1, 4, 7, 10]
    assert "samples" not in found
    assert "controllability" not in found


def test_a_continued_adapter_is_compared_with_the_adapter_as_it_began(run: Path, data: Path, tmp_path: Path) -> None:
    base = run.parent / "base"
    first, batches = build(base, data, lora=True, optimizer=sgd)
    make_trainer(tmp_path / "a", max_steps=2, limit_val_batches=0).fit(first, batches)
    first.policy.model.save_pretrained(tmp_path / "adapter")
    policy = PolicyConfig(str(base), adapter=str(tmp_path / "adapter"))
    still = functools.partial(torch.optim.SGD, lr=0.0)
    second, batches = build(base, data, policy=policy, optimizer=still)
    trainer = make_trainer(tmp_path / "b", max_steps=1, limit_val_batches=0)
    trainer.fit(second, batches)
    trainer.save_checkpoint(tmp_path / "still.ckpt")
    args = ["--model", tmp_path / "still.ckpt", "--source", data, "--parts", "[unlearning]", "--bins", 1]
    assert called(*args, "--output", tmp_path / "out") == 0
    assert document(tmp_path / "out")["base"] == str((tmp_path / "adapter").resolve())
    assert called(*args, "--output", tmp_path / "bare", "--base", base) == 0
    changes = [document(tmp_path / name)["unlearning"]["conditions"]["best"]["chosen"][0] for name in ("out", "bare")]
    assert changes[0]["value"] == pytest.approx(0, abs=1e-5), "nothing was learnt since"
    assert abs(changes[1]["value"]) > 1e-3, "the adapter itself had learnt something"


def test_an_untrained_policy_has_unlearnt_nothing(run: Path, data: Path, tmp_path: Path) -> None:
    base = run.parent / "base"
    args = ["--model", base, "--base", base, "--source", data, "--output", tmp_path, "--parts", "[unlearning]"]
    assert called(*args, "--template", "OverallGoal") == 0
    conditions = document(tmp_path)["unlearning"]["conditions"]
    assert set(conditions) == {"none", "best", "worst", "own"}
    values = [f["value"] for roles in conditions.values() for figures in roles.values() for f in figures]
    assert {value for value in values if value is not None} == {0.0}


def test_a_model_without_goals_is_sampled_without_one(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["--model", run.parent / "base", "--source", data, *JUDGE, *FEW]
    assert called(*args, "--output", tmp_path / "plain") == 0
    found = document(tmp_path / "plain")
    assert found["goals"] == []
    assert found["without_goal"]["controllability"]["sampled"]["mean"]["n"] == 12
    assert "two goals" in found["controllability"]["sampled"]["spearman"]["why"]
    assert "--template" in found["left_out"]["discrimination"]
    assert "--base" in found["left_out"]["unlearning"]
    assert "left out: unlearning: nothing says which model" in capsys.readouterr().out
    assert called(*args, "--output", tmp_path / "both", "--template", "OverallGoal") == 0
    both = document(tmp_path / "both")
    assert both["goals"] == [1, 2.5, 4, 5.5, 7, 8.5, 10]
    same = both["without_goal"]["controllability"]["greedy"]["mean"]
    assert same == found["without_goal"]["controllability"]["greedy"]["mean"]


def test_responses_that_cannot_be_judged_are_counted_and_asked_for_again(run: Path, data: Path, tmp_path: Path) -> None:
    args = ["--model", run / "hf", "--source", data, *FEW, "--parts", "[controllability]", "--output", tmp_path]
    args += ["--judge", "Function", "--judge.function", "stub_judges.never"]
    assert called(*args) == 1
    lines = read_jsonl(tmp_path / "samples.jsonl")
    without = sum(row["score"] is None for row in lines)
    assert 0 < without < len(lines)
    assert document(tmp_path)["trouble"]["without_score"] == without


def test_completions_are_read_as_well_as_pairs(run: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"say {i}",
            "completions": [{"response": f"{i} {k}", "overall_score": 1.0 + 2 * k} for k in range(4)],
        }
        for i in range(6)
    ]
    data = write_jsonl(tmp_path / "scored.jsonl", rows)
    args = [
        "--model",
        run / "hf",
        "--source",
        data,
        "--output",
        tmp_path / "out",
        *JUDGE,
        "--engine",
        "stub_judges.Obedient",
    ]
    assert called(*args, "--parts", "[extrapolation]", "--limit", 4) == 0
    found = document(tmp_path / "out")
    assert (found["prompts"], found["split"]) == (4, "train")
    assert found["extrapolation"]["training"]["responses"] == 24, "all responses, not the pairs' alone"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            ["--judge", "Function", "--judge.function", "stub_judges.never", "--parts", "[unlearning]"],
            "--judge has no effect",
        ),
        (["--samples", 3], "--samples has no effect without the parts controllability"),
        (["--parts", "[controllability]"], "--parts controllability: samples need a judge"),
        (["--parts", "[discrimination]", "--bins", 4], "--bins has no effect without the part unlearning"),
        (["--parts", "[discrimination]", "--base", "x/y"], "--base has no effect without the part unlearning"),
        (
            [*JUDGE, "--parts", "[length]", "--max_length", 99],
            "--max_length has no effect without the parts unlearning",
        ),
        ([*JUDGE, "--goals", "[11]"], "must be on the scale from 1 to 10, found 11"),
        ([*JUDGE, "--goals", "[1, 1.01]"], "two of them read the same"),
        ([*JUDGE, "--goals", "[]"], "--goals is an empty list"),
        ([*JUDGE, "--temperature", 0], "--temperature 0 would sample one response again and again"),
        (["--goal", 5], "--goal is of benchmarks and has no effect without --suite"),
        (["--max_length", 5000], "must be from 2 to what the model takes, 512"),
        (["--split", "tests"], "no split 'tests'"),
        (["--limit", 0], "--limit must be at least 1"),
        ([*JUDGE, "--base", "not/here/there"], "--base not/here/there: no such folder, and not a Hub id"),
        (["--limits", 3], "--limits: no such option. Did you mean --limit?"),
        (["--guidance", 0.5], "--guidance has no effect without the parts controllability"),
        ([*JUDGE, "--against", 1], "against has no effect without a guidance above 0"),
        ([*JUDGE, "--guidance", 1, "--goals", "[1]"], "--guidance has no effect: the goal that it pushes away from, 1"),
        ([*JUDGE, "--guidance", 1, "--against", 11], "against must be on the scale from 1 to 10, or none; found 11"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(
    extra: list[object], said: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("--model", run / "hf", "--source", data, "--output", tmp_path, *extra) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_options_of_the_evaluation_are_refused_beside_a_suite(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--suite", "AlpacaEval", "--model", run / "hf", "--output", tmp_path]
    assert called(*args, *JUDGE) == 2
    assert "--judge has no effect with --suite" in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text("suite: AlpacaEval\n")
    assert called("--config", config, "--model", run / "hf", "--output", tmp_path, "--source", data) == 2
    assert "--source has no effect with --suite" in capsys.readouterr().err


def test_a_base_with_another_vocabulary_is_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", "gemma")
    args = ["--model", run / "hf", "--base", other, "--source", data, "--output", tmp_path / "out"]
    assert called(*args, "--parts", "[unlearning]") == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_guidance_samples_as_generate_does_and_is_told(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = ["--guidance", 2, "--against", "none", "--plausibility", 0.01]
    args = ["--model", run / "hf", "--source", data, *JUDGE, *FEW, "--goals", "[4, 10]", "--parts", "[controllability]"]
    for name, more in (("plain", []), ("guided", guided), ("floor", ["--plausibility", 0.01])):
        assert called(*args, *more, "--output", tmp_path / name) == 0
    rows = {name: read_jsonl(tmp_path / name / "samples.jsonl") for name in ("plain", "guided", "floor")}
    out = tmp_path / "generated.jsonl"
    cli.main([
        "generate",
        *map(str, ["--model", run / "hf", "--prompts", data / "test.jsonl", "--output", out, *FEW, *guided,
                               "--goal", "[4, 10]"]),
    ])  # fmt: skip
    key = ("prompt_id", "goal", "sample", "response")
    made = {tuple(str(json.loads(line)[k]) for k in key) for line in out.read_text().splitlines()}
    sampled = {
        (r["prompt_id"], f"{r['goal']:g}", str(r["sample"]), r["response"]) for r in rows["guided"] if not r["greedy"]
    }
    assert sampled == made
    greedy = {name: [row["response"] for row in found if row["greedy"]] for name, found in rows.items()}
    assert greedy["plain"] == greedy["floor"] != greedy["guided"], "greedy responses are guided too"
    assert document(tmp_path / "plain")["guidance"] is None
    assert document(tmp_path / "guided")["guidance"] == {"weight": 2, "against": "none", "plausibility": 0.01}
    assert document(tmp_path / "floor")["guidance"] == {"weight": 0, "against": None, "plausibility": 0.01}
    assert called(*args, "--output", tmp_path / "guided") == 2, "plain sampling doesn't go on with guided samples"
    assert "made with other settings" in capsys.readouterr().err


def test_other_settings_do_not_go_on_in_the_same_folder(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", run / "hf", "--source", data, "--output", tmp_path, *JUDGE, *FEW, "--parts", "[length]"]
    assert called(*args, "--goals", "[1]") == 0
    assert called(*args, "--goals", "[1, 10]") == 0, "more goals go on"
    assert called(*args, "--goals", "[1]", "--seed", 1) == 2
    assert "made with other settings" in capsys.readouterr().err
