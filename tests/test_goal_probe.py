"""The probe: how far margins move between a pair's two goals, and which gradient is left where its halves meet."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, make_trainer, pairs_of, run_command, scored_rows, sgd, write_jsonl
from rap_lightning.batches.encode import Encoder
from rap_lightning.callbacks import GoalMargins
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.training.goal_probe import (
    GoalProbe,
    advice,
    encode_halves,
    load_policy,
    mean_shift,
    measure_margins,
    probe_goal,
    sample_pairs,
)
from test_fit import assert_same, weights


class Silent(GoalTemplate):
    """The same text under every goal."""

    def text(self, goal: float) -> str:  # type: ignore[override]
        return "Answer well."


def wide_rows(count: int) -> list[dict[str, Any]]:
    rows = scored_rows(count)
    for number, row in enumerate(rows):
        row["score_chosen"], row["score_rejected"] = 9.5, 2.0 + number / count
    return rows


def test_the_gradient_that_is_left_is_that_of_full_sequences_by_another_route(tiny: Path) -> None:
    """Log-probs from the model's own logits, gradients of B alone."""
    pairs, _ = pairs_of(wide_rows(3))
    policy, tokenizer, goal = (
        load_policy(str(tiny), torch.float64),
        PolicyConfig(str(tiny)).load_tokenizer(),
        OverallGoal(),
    )
    found = probe_goal(policy, goal, pairs, tokenizer, 512)
    b = [p for name, p in policy.named_parameters() if "lora_B" in name]
    encoder, left, shares, shifts = Encoder(tokenizer, goal, 512), [], [], []
    for high, low in encode_halves(pairs, encoder):
        gradients, margins = [], []
        for prompt in (high.prompt_ids, low.prompt_ids):
            logps = []
            for response in (high.chosen_ids, high.rejected_ids):
                ids = torch.tensor([[*prompt, *response]])
                logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                logps.append(logits.gather(1, torch.tensor(response)[:, None]).sum())
            margins.append(logps[0] - logps[1])
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(margins[-1], b)]))
        shifts.append(float((margins[0] - margins[1]).detach()))
        shares.append(float((gradients[0] - gradients[1]).norm() / (gradients[0].norm() + gradients[1].norm())))
        left.append(gradients[0] - gradients[1])
    assert found.shift.value == pytest.approx(sum(shifts) / 3, abs=1e-5)
    assert found.left == pytest.approx(sum(shares) / 3, rel=1e-4)
    cosines = [float(torch.cosine_similarity(*two, dim=0)) for two in itertools.combinations(left, 2)]
    assert found.agreement == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert min(cosines) < found.agreement < max(cosines)
    halves = encode_halves(pairs, encoder)
    assert measure_margins(policy, halves, 0) == pytest.approx(shifts, abs=1e-5), "the cheap way is the same shift"


def test_the_same_pairs_are_probed_whatever_their_order() -> None:
    pairs, _ = pairs_of(scored_rows(60))
    drawn = sample_pairs(pairs, 5, 1)
    assert drawn == sample_pairs(reversed(pairs), 5, 1)
    assert drawn != sample_pairs(pairs, 5, 2)
    gaps = sorted(pair.rewards[0] - pair.rewards[1] for pair in pairs)
    assert min(pair.rewards[0] - pair.rewards[1] for pair in drawn) > gaps[len(gaps) // 2], "wide ones"


def test_strengths_of_different_sign_add_up_and_of_one_sign_partly_cancel(tiny: Path) -> None:
    """∇m(s) is s ∇m for a new adapter, whatever the model: left is |s_w - s_l| / (|s_w| + |s_l|), and nothing moves."""
    pairs, _ = pairs_of(wide_rows(3))
    policy, tokenizer = load_policy(str(tiny)), PolicyConfig(str(tiny)).load_tokenizer()
    across = probe_goal(policy, AdapterStrength(neutral=5.5), pairs, tokenizer, 512)
    assert across.left == pytest.approx(1, abs=1e-4)
    assert across.shift.value == pytest.approx(0, abs=1e-4)
    above = AdapterStrength(neutral=1.5)
    shares = []
    for pair in pairs:
        high, low = (above.strength(reward) for reward in pair.rewards)
        shares.append((high - low) / (high + low))
    found = probe_goal(policy, above, pairs, tokenizer, 512)
    assert found.left == pytest.approx(sum(shares) / 3, rel=1e-3)
    assert found.agreement == pytest.approx(across.agreement, abs=1e-4), "that of ∇m, whatever the strengths"


def test_advice_names_what_helps_only_where_goals_are_not_read() -> None:
    shift = mean_shift([0.1, 0.2, 0.3])
    assert shift.value == pytest.approx(0.2)
    assert shift.low is not None
    assert shift.high is not None
    assert shift.low < 0.2 < shift.high
    blind, half, sees = (GoalProbe(f"Goal{at}", 3, shift, 0.6 - at, at) for at in (-0.002, 0.02, 0.1))
    assert "Goals hardly reach the model: with Goal-0.002, 60.2% of plain" in advice([blind])
    assert "Goals partly reach the model" in advice([blind, half])
    faint = GoalProbe("Faint", 3, shift, 0.04, 0.3)
    assert "Goals hardly reach the model: with Faint, 4.0% of plain" in advice([faint]), "a direction without size"
    assert "with Goal0.02," in advice([faint, half])
    for word in ("--goals", "warm_up", "AdapterStrength"):
        assert word in advice([blind])
    assert advice([blind, sees, half]) == (
        "Goals reach the model: with Goal0.1, 50.0% of plain DPO's gradient is left of a pair, and pairs agree by a "
        "cosine of 0.100; train with it."
    )


def test_inspect_prints_the_neutral_goal_that_it_fitted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", wide_rows(16))
    goal = ["--goal", "AdapterStrength", "--goal.neutral", "mean"]
    shown = run_command("inspect", "--source", str(source), "--examples", "0", *goal)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^scale fitted: RewardScale\(.*, 0 at \d", shown.stdout, re.MULTILINE), shown.stdout


def test_inspect_prints_a_line_for_each_template(tiny: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", wide_rows(16))
    goals = json.dumps(["OverallGoal", {"class_path": "OverallGoal", "init_args": {"placement": "user"}}])
    ask = ["inspect", "--source", str(source), "--model", str(tiny), "--probe_pairs", "3", "--examples", "0"]
    shown = run_command(*ask, "--goals", goals)
    assert shown.returncode == 0, shown.stderr
    assert "OverallGoal, user" in shown.stdout
    assert "of plain DPO's gradient is left of a pair, and pairs agree by" in shown.stdout
    shown = run_command(*ask[:-2], "--json")
    assert shown.returncode == 0, shown.stderr
    (one,) = json.loads(shown.stdout)["probes"]
    assert (one["goal"], one["pairs"]) == ("OverallGoal", 3)
    assert 0 < one["left"] <= 1
    assert -1 <= one["agreement"] <= 1
    assert math.isfinite(one["shift"]["value"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--goal", "null", "--model", "MODEL"], "--goal null states none"),
        (["--goals", "[OverallGoal]"], "--goals has no effect without --model"),
        (["--probe_pairs", "3"], "--probe_pairs has no effect without --model"),
        (["--model", "MODEL", "--tokenizer", "MODEL"], "--tokenizer has no effect with --model"),
        (["--model", "MODEL", "--goals", "[]"], "--goals is an empty list"),
        (["--model", "MODEL", "--probe_pairs", "1"], "at least 2"),
        (["--model", "MODEL", "--goals", "[test_goal_probe.Silent]"], "Silent states every goal alike, 'Answer well.'"),
        (["--model", "ADAPTER"], "is an adapter, and the probe adds an adapter of its own"),
        (["--model", "last.ckpt"], "--model last.ckpt is a checkpoint"),
        (["--model", "no/where"], "--model no/where: no tokenizer"),
        (["--model", "MODEL", "--max_length", "20"], "No pair is left"),
        (
            ["--model", "MODEL", "--goals", '[{"class_path": "AttributeGoal", "init_args": {"attributes": ["kind"]}}]'],
            "AttributeGoal states kind, which",
        ),
    ],
)
def test_a_probe_that_can_say_nothing_is_refused_in_a_sentence(
    more: list[str], message: str, tiny: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", wide_rows(6))
    (tmp_path / "adapter_config.json").write_text("{}")
    named = {"MODEL": str(tiny), "ADAPTER": str(tmp_path)}
    args = ["inspect", "--source", str(source), "--examples", "0", *(named.get(one, one) for one in more)]
    shown = run_command(*args)
    assert shown.returncode in (1, 2)
    assert message in " ".join(shown.stderr.split()), shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_template_without_room_for_a_response_says_so(tiny: Path) -> None:
    pairs, _ = pairs_of(wide_rows(3))
    encoder = Encoder(PolicyConfig(str(tiny)).load_tokenizer(), OverallGoal(), 20)
    with pytest.raises(DataError, match="OverallGoal: no pair can be encoded: "):
        encode_halves(pairs, encoder)


def test_one_pair_has_no_other_to_agree_with(tiny: Path) -> None:
    pairs, _ = pairs_of(wide_rows(1))
    with pytest.raises(DataError, match="of 1 pairs a single one can be probed"):
        probe_goal(load_policy(str(tiny)), OverallGoal(), pairs, PolicyConfig(str(tiny)).load_tokenizer(), 512)


def test_data_without_scores_have_nothing_to_probe(tiny: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith("score")} for row in wide_rows(6)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    shown = run_command("inspect", "--source", source, "--model", tiny)
    assert shown.returncode in (1, 2)
    assert "score" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_one_pair_is_too_few_to_probe(tiny: Path, tmp_path: Path) -> None:
    shown = run_command("inspect", "--source", write_jsonl(tmp_path / "rows.jsonl", wide_rows(1)), "--model", tiny)
    assert shown.returncode == 1
    assert "needs at least 2 pairs with a winner and a loser by score, found 1." in shown.stderr


# -- in fit -----------------------------------------------------------------------------------------------------------


def test_fit_prints_the_shift_before_its_first_step_and_trains_as_without(
    tiny: Path, pairs_folder: Path, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    runs = []
    for name, callbacks in (("plain", []), ("probed", [GoalMargins(pairs=3)])):
        policy = PolicyConfig(str(tiny), lora=Lora(r=4, dropout=0.3), dropout=True)
        module, data = build(tiny, pairs_folder, policy=policy, optimizer=sgd)
        make_trainer(tmp_path / name, max_steps=2, callbacks=callbacks).fit(module, data)
        runs.append(module)
    assert_same(weights(runs[1]), weights(runs[0]), 0)
    (line,) = [r.message for r in caplog.records if r.message.startswith("goals: ")]
    pairs = sample_pairs(data.scored_pairs("train", 12, 0), 3, 0)
    expected = mean_shift(measure_margins(load_policy(str(tiny)), encode_halves(pairs, data.encoder), 0))
    assert f"moves by {expected.value:+.2f} nats (95% interval {expected.low:+.2f} to" in line
    assert "goals of 3 pairs" in line


def test_one_half_alone_or_a_stream_is_refused_before_weights_are_loaded(
    tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    for options, message in (
        ({"relabel": "chosen"}, "relabel chosen doesn't train"),
        ({"streaming": True}, "a stream"),
    ):
        module, data = build(tiny, pairs_folder, **options)
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, max_steps=1, callbacks=[GoalMargins()]).fit(module, data)
        assert module.policy is None
    with pytest.raises(ConfigError, match="at least 2, found 1"):
        GoalMargins(pairs=1)
