"""The study of docs/study: its short version runs and goes on where it was killed, its numbers are what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT))
from benchmarks.study.figures import difference
from benchmarks.study.fitting import Recipe, fit
from benchmarks.study.jobs import Plan
from benchmarks.study.measuring import Asker, logps
from benchmarks.study.settings import FULL, SHORT
from benchmarks.study.worlds import never_swapped

from rap_lightning.losses import DPO
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.world import make_world


def study(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.study",
        "--short",
        "--output",
        str(folder),
        "--work",
        str(folder / "work"),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_short_study_runs_goes_on_and_writes_its_tables(tmp_path: Path) -> None:
    done = study(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines()
    arms = {json.loads(line)["arm"] for line in lines}
    assert arms == {"base", "combination", *(SHORT.arms or ())}
    table = (tmp_path / "README.md").read_text()
    for text in ("RA (both goals)", "best combination", "H1: RA minus DPO", "noise 2", "CPU minutes"):
        assert text in table
    for picture in ("arms", "curves", "guidance", "knobs", "unlearning"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
    # killed while it wrote a line, two runs before the end
    results.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:100])
    assert study(tmp_path).returncode == 0
    again = results.read_text().splitlines()
    assert again[: len(lines) - 2] == lines[:-2]
    strip = {"cpu_s", "wall_s"}
    bare = [{k: v for k, v in json.loads(line).items() if k not in strip} for line in (*lines, *again)]
    assert sorted(map(str, bare[: len(lines)])) == sorted(map(str, bare[len(lines) :])), "the same numbers again"


def test_settings_are_chosen_in_worlds_that_no_figure_comes_from() -> None:
    assert not set(FULL.tuning) & set(FULL.seeds)
    plan = Plan(FULL, {})
    for arm in plan.arms.ARMS.values():
        assert len(arm.trials) == FULL.trials, "every arm has as many trials"
    jobs = plan.open()
    assert {job.stage for job in jobs} == {"base"}, "nothing runs before its base"

    def line(trial: int, score: float) -> dict[str, object]:
        return {"asks": "none", "conditions": {"none": {"score": score}}}

    lines = {f"tune dpo {i} default 100": line(i, score) for i, score in enumerate((5.0, 7.0, 6.0, 4.0))}
    assert Plan(FULL, lines).chosen("dpo") == 1
    lines["main dpo 0 default 1"] = line(0, 9.0)
    assert Plan(FULL, lines).chosen("dpo") == 1, "scores of the worlds that figures come from choose nothing"
    del lines["tune dpo 3 default 100"]
    assert Plan(FULL, lines).chosen("dpo") is None, "nothing is chosen before all trials are there"


def test_a_difference_knows_what_is_certain() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 1, 40) for _ in range(5)]
    clear = difference([(list(one + 1), list(one)) for one in noise])
    assert (round(clear.mean, 6), clear.ahead, clear.verdict) == (1.0, 5, "holds")
    assert difference([(list(one), list(one + 1)) for one in noise]).verdict == "fails"
    unsure = difference([(list(one), list(rng.normal(0, 1, 40))) for one in noise])
    assert unsure.low < unsure.mean < unsure.high
    assert unsure.verdict == "open"
    # worlds that disagree make the interval wide, however many prompts there are
    apart = difference([([v] * 1000, [0.0] * 1000) for v in (-2.0, 1.0, 1.0, 1.0, 1.0)])
    assert apart.low < 0 < apart.high
    assert apart.ahead == 4


def test_the_fault_of_the_papers_code_keeps_the_winner_under_both_goals() -> None:
    turns = [[{"role": "user", "content": "List 3 tools."}, {"role": "assistant", "content": c}] for c in "ab"]
    pair = {"chosen": turns[0], "rejected": turns[1], "score_chosen": 8.0, "score_rejected": 2.5}
    first, second = never_swapped([pair, pair | {"score_rejected": 8.0}])
    assert OverallGoal().text(8.0) == first["chosen"][0]["content"]
    assert OverallGoal().text(2.5) == second["rejected"][0]["content"]
    assert first["chosen"][1:] == second["chosen"][1:] == turns[0]


def test_remembered_references_and_own_log_probabilities_are_those_of_the_package(tmp_path: Path) -> None:
    world = tmp_path / "world"
    make_world(world, train_pairs=40, test_pairs=10, base_steps=10)
    recipe = Recipe(world / "train.jsonl", DPO(0.5), 1e-3, 6, OverallGoal())
    policies = [fit(world / "base", recipe, 8, seed=0)[0] for _ in range(2)]  # the second remembers all
    for mine, other in zip(*(p.parameters() for p in policies), strict=True):
        assert torch.equal(mine, other)
    from lightning.pytorch import Trainer, seed_everything

    from rap_lightning.datamodule import PreferenceDataModule
    from rap_lightning.module import PreferenceModule

    seed_everything(0, verbose=False)
    data = PreferenceDataModule(str(recipe.source), max_length=224, batch_size=8, seed=0)
    module = PreferenceModule(  # live reference
        PolicyConfig(str(world / "base")),
        DPO(0.5),
        optimizer=lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0, fused=True),
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=6, max_epochs=-1, log_every_n_steps=1, **options).fit(module, datamodule=data)
    assert module.policy is not None
    for mine, other in zip(policies[0].parameters(), module.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    asker = Asker(module.tokenizer, None)
    pairs = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    asked = [(asker.ids(p["prompt"], goal), asker.response(p, "chosen")) for p in pairs for goal in (None, 7.5)]
    alone = []
    for prompt, response in asked:
        with torch.no_grad():
            logits = module.policy.causal_lm(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        alone.append(sum(float(logits[at, token]) for at, token in zip(places, response, strict=True)))
    assert logps(module.policy, asked, at_once=7) == pytest.approx(alone, abs=1e-4)
