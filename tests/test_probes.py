"""Callbacks that measure during fit: they change nothing, and a resumed run goes on with their lines."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from cli_process import fit_on_ranks
from conftest import build, make_trainer, read_jsonl, sgd
from rank_worker import run
from rap_lightning.callbacks import Checkpoints, GoalSamples, LikelihoodProbe, SteeringTable
from rap_lightning.errors import ConfigError
from rap_lightning.models.generation import Generation
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.training.schedules import ConstantWithWarmup
from test_evaluate import logps_by_hand
from test_strategies import base  # noqa: F401

SHORT = {"optimizer": sgd, "schedule": ConstantWithWarmup(), "generation": Generation(max_new_tokens=8)}


def length(prompt: str, response: str) -> float:
    return float(len(response))


def probes() -> list[Any]:
    return [
        GoalSamples(length, goals=[1, 10], prompts=3, samples=2, every_n_steps=2),
        LikelihoodProbe(pairs=6, bins=2, every_n_steps=2),
    ]


def fit(folder: Path, model: Path, data: Path, *callbacks: Any, ckpt: Path | None = None, **options: Any) -> Any:
    """Six optimizer steps of 2 x 4 pairs, in the folder itself."""
    trainer_options = options.pop("trainer", {})
    module, loaded = build(model, data, **(SHORT | options))
    trainer = make_trainer(
        folder, logger=CSVLogger(folder, name="", version=""), accumulate_grad_batches=2, limit_val_batches=0,
        callbacks=list(callbacks), **({"max_epochs": 1} | trainer_options),
    )  # fmt: skip
    trainer.fit(module, loaded, ckpt_path=ckpt, weights_only=True)
    return module


def test_lines_come_at_optimizer_steps_and_nothing_else_changes(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    policy = lambda: PolicyConfig(str(tiny), lora=Lora(r=4, dropout=0.3), dropout=True)  # noqa: E731
    plain = fit(tmp_path / "plain", tiny, pairs_folder, policy=policy())
    probed = fit(tmp_path / "probed", tiny, pairs_folder, *probes(), policy=policy())
    for name, weight in plain.policy.state_dict().items():
        assert torch.equal(weight, probed.policy.state_dict()[name]), name
    samples = read_jsonl(tmp_path / "probed" / "samples.jsonl")
    assert [row["step"] for row in samples] == [step for step in (0, 2, 4, 6) for _ in range(2 * 3 * 2)]
    assert set(samples[0]) == {"step", "goal", "prompt", "response", "score", "tokens"}
    assert {row["goal"] for row in samples} == {1, 10}
    assert all(row["score"] == len(row["response"]) and 1 <= row["tokens"] <= 8 for row in samples)
    likelihood = read_jsonl(tmp_path / "probed" / "likelihood.jsonl")
    assert sorted({row["step"] for row in likelihood}) == [0, 2, 4, 6]
    assert {row["change_nats"] for row in likelihood if row["step"] == 0} == {0.0}
    assert any(abs(row["change_nats"]) > 1e-3 for row in likelihood if row["step"] == 6)
    with (tmp_path / "probed" / "metrics.csv").open() as file:
        logged = [(int(row["step"]), row) for row in csv.DictReader(file)]
    by_hand = {
        "samples/goal-10/score": [r["score"] for r in samples if r["step"] == 4 and r["goal"] == 10],
        "samples/goal-1/tokens": [r["tokens"] for r in samples if r["step"] == 4 and r["goal"] == 1],
    }
    for row in likelihood:
        if row["step"] == 4:
            name = f"likelihood/{row['condition']}/{row['role']}/{row['low']:g}-{row['high']:g}"
            by_hand[name] = [row["change_nats"]]
    assert len(by_hand) > 8
    for name, values in by_hand.items():
        (found,) = [float(row[name]) for step, row in logged if step == 4 and row[name]]
        assert found == pytest.approx(np.mean(values)), name


def test_the_probe_is_what_the_models_own_logits_say(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, tiny, pairs_folder, LikelihoodProbe(pairs=99, bins=1, every_n_steps=3))
    module.policy.model.save_pretrained(tmp_path / "trained")
    module.tokenizer.save_pretrained(tmp_path / "trained")
    rows = read_jsonl(pairs_folder / "test.jsonl")
    last = {(r["condition"], r["role"]): r for r in read_jsonl(tmp_path / "likelihood.jsonl") if r["step"] == 6}
    text = OverallGoal().text
    for role in ("chosen", "rejected"):
        for condition in ("none", "best", "own"):
            changes = []
            for row in rows:
                goal = {"none": None, "best": text(10), "own": text(row[f"score_{role}"])}[condition]
                history, response = row[role][:-1], row[role][-1]["content"]
                after, before = (logps_by_hand(f, history, goal, response) for f in (tmp_path / "trained", tiny))
                changes.append(after - before)
            assert last[condition, role]["n"] == 9
            assert last[condition, role]["change_nats"] == pytest.approx(np.mean(changes), abs=1e-3)


def test_a_resumed_run_goes_on_with_the_lines(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, tiny, pairs_folder, *probes())
    saver = Checkpoints(parts / "checkpoints", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(parts, tiny, pairs_folder, *probes(), saver, trainer={"enable_checkpointing": True})
    with (parts / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "go')  # as a kill leaves it
    fit(parts, tiny, pairs_folder, *probes(), ckpt=parts / "checkpoints" / "step=3.ckpt")
    for name in ("samples.jsonl", "likelihood.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_new_run_does_not_go_on_with_anothers_lines(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        fit(tmp_path, tiny, pairs_folder, *probes(), trainer={"max_steps": 1})
    assert len(read_jsonl(tmp_path / "samples.jsonl")) == 2 * 2 * 3 * 2


@pytest.mark.parametrize(("said", "reward"), [("raised ValueError: not today", None), ("gave nan", float("nan"))])
def test_a_judge_that_fails_ends_no_run(
    said: str, reward: float | None, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    def picky(prompt: str, response: str) -> float:
        if reward is None:
            raise ValueError("not today")
        return reward

    with pytest.warns(UserWarning, match=f"the judge {said}"):
        fit(tmp_path, tiny, pairs_folder, GoalSamples(picky, prompts=1), trainer={"max_steps": 1})
    assert {row["score"] for row in read_jsonl(tmp_path / "samples.jsonl")} == {None}


def test_a_table_s_judge_that_fails_ends_the_run_at_its_beginning_and_not_at_its_end(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    calls = []

    def tires(prompt: str, response: str) -> float:
        calls.append(response)
        if len(calls) > 4:
            raise ValueError("tired")
        return 1.0

    table = SteeringTable(tires, goals=(1, 10), samples=2)
    with pytest.warns(UserWarning, match="the judge raised ValueError: tired. There is no table"):
        module = fit(tmp_path, tiny, pairs_folder, table, trainer={"max_steps": 1})
    assert module.trainer.global_step == 1
    assert not (tmp_path / "steering.json").exists()
    with pytest.raises(ConfigError, match="the judge raised ValueError: tired"):
        fit(tmp_path / "b", tiny, pairs_folder, SteeringTable(tires, samples=2), trainer={"max_steps": 1})
    with pytest.raises(ConfigError, match="the judge gave nan"):
        fit(tmp_path / "c", tiny, pairs_folder, SteeringTable(lambda p, r: float("nan")), trainer={"max_steps": 1})


def test_samples_of_callbacks_are_guided_of_plain_pairs_too(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, guidance in (("plain", 0.0), ("guided", 3.0)):
        texts: list[str] = []

        def judge(prompt: str, response: str, seen: list[str] = texts) -> float:
            seen.append(response)
            return float(len(response))

        fit(
            tmp_path / name, tiny, pairs_folder, GoalSamples(length, goals=[1, 10], prompts=4, samples=2),
            SteeringTable(judge, goals=(1, 10), samples=8), relabel="none", trainer={"max_steps": 1},
            generation=Generation(max_new_tokens=8, guidance=guidance),
        )  # fmt: skip
        rows = [row for row in read_jsonl(tmp_path / name / "samples.jsonl") if row["step"] == 0]
        by_goal = [[row["response"] for row in rows if row["goal"] == goal] for goal in (1, 10)]
        found[name] = [*by_goal, texts[:8], texts[8:16]]
    for low, high in ((0, 1), (2, 3)):
        assert found["guided"][high] != found["plain"][high]
        assert found["guided"][low] == found["plain"][low], "the low goal is pushed away from itself"
    other = SteeringTable(length, goals=(1, 10), samples=8, beside=str(tmp_path / "guided"))
    with pytest.raises(ConfigError, match=r"To compare them, use the same .* --model.generation"):
        fit(tmp_path / "beside", tiny, pairs_folder, other)


def test_data_without_goals_are_sampled_without_one_and_have_no_rewards(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    fit(tmp_path, tiny, pairs_folder, GoalSamples(length, prompts=2), goal=None, trainer={"max_steps": 1})
    assert {row["goal"] for row in read_jsonl(tmp_path / "samples.jsonl")} == {None}
    with pytest.raises(ConfigError, match="needs the judge's rewards"):
        fit(tmp_path / "b", tiny, pairs_folder, LikelihoodProbe(), goal=None, trainer={"max_steps": 1})
    with pytest.raises(ConfigError, match="goals have no effect with"):
        fit(tmp_path / "c", tiny, pairs_folder, GoalSamples(goals=[1]), goal=None, trainer={"max_steps": 1})


def test_goals_that_can_not_be_asked_for_are_refused_before_weights_are_loaded(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    for callback in (GoalSamples(goals=[0, 5]), SteeringTable(length, goals=[0, 5])):
        module, data = build(tiny, pairs_folder)
        with pytest.raises(ConfigError, match="goals must be on the scale from 1 to 10, found 0"):
            make_trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(module, data)
        assert module.policy is None


def test_two_processes_measure_what_one_does(base: dict[str, Any], process_server: Any) -> None:  # noqa: F811
    folder = Path(base["model"]).parent
    case = base | {"reference": "frozen", "measured": True}
    run(case | {"name": "measured-one", "ranks": 1, "strategy": "auto"}, folder)
    kinds = ("ddp", "fsdp2")
    two = [case | {"name": f"measured-{kind}", "ranks": 2, "strategy": kind} for kind in kinds]
    fit_on_ranks(process_server, two, 2, folder)
    one, *others = (next((folder / f"measured-{name}").rglob("likelihood.jsonl")) for name in ("one", *kinds))
    for two in others:
        assert len(read_jsonl(one)) == len(read_jsonl(two)) > 20
        for ours, theirs in zip(read_jsonl(one), read_jsonl(two), strict=True):
            assert theirs == ours | {"change_nats": pytest.approx(ours["change_nats"], abs=1e-4)}
    alone, shared = (read_jsonl(path.with_name("samples.jsonl")) for path in (one, others[0]))
    assert [(r["step"], r["goal"], r["prompt"]) for r in alone] == [(r["step"], r["goal"], r["prompt"]) for r in shared]
