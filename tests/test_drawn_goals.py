"""Goals drawn from the whole scale: under each one the response wins whose reward is nearer, as -(g - r)^2 says."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from conftest import encode, make_tokenizer, pair_of, pairs_of, run_command, scored_rows
from rap_lightning.batches.types import PairRewards
from rap_lightning.errors import ConfigError
from rap_lightning.losses import SoftLabelDPO
from rap_lightning.onpolicy.round_fit import data_seed
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal
from rap_lightning.preferences.relabelling import ORIGINS, RelabelledView, Relabelling, draw_goals, is_tie
from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale
from test_fit import logged
from test_stream_fit import run, same, stream_folder

DRAWN = ("upper-goal", "lower-goal")
ONE = pair_of(scored_rows(1)[0])


def random_pairs(count: int, low: float = 1.0, high: float = 10.0, seed: int = 0) -> list[Any]:
    rng = random.Random(seed)
    rewards = [sorted((round(rng.uniform(low, high), 2) for _ in range(2)), reverse=True) for _ in range(count)]
    return [replace(ONE, id=f"p{i}", rewards=(high, low)) for i, (high, low) in enumerate(rewards) if high > low + 0.2]


def drawn(pairs: list[Any], goal: GoalTemplate, **options: Any) -> list[Any]:
    apart = [pair for pair in pairs if not is_tie(goal, pair.rewards, pair.attributes)]
    view = RelabelledView(apart, goal, Relabelling(**({"goals_per_pair": 6} | options)))
    return [one for one in view if one.origin in DRAWN]


SCALES = [
    RewardScale(1, 10),
    LinearScale(judge_low=1, judge_high=10),
    LinearScale(0, 100, decimals=0, judge_low=2, judge_high=8),
    QuantileScale(knots=[1.0, 1.5, 2.0, 2.0, 4.0, 9.0, 10.0]),
]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_the_nearer_reward_wins_under_a_drawn_goal(scale: RewardScale) -> None:
    """In the judge's units and in the goal's; rewards beyond a mapped scale's ends are among them."""
    found = drawn(random_pairs(200), OverallGoal(scale))
    assert Counter(one.origin for one in found).keys() == set(DRAWN)
    for one in found:
        of_chosen, of_rejected = one.rewards
        assert abs(one.goal_reward - of_chosen) < abs(one.goal_reward - of_rejected)
        stated = float(one.goal)
        nearness = [abs(stated - scale.goal(reward)) for reward in one.rewards]
        assert nearness[0] < nearness[1] + 10.0**-scale.decimals, "the number in the prompt says the same, rounded"
        assert scale.printed(scale.goal(one.goal_reward)) == one.goal
        assert (one.origin == "upper-goal") is (of_chosen > of_rejected)
        assert f"Overall score: {one.goal}." in one.goal_text


@pytest.mark.parametrize("decimals", [0, 1])
def test_every_goal_of_the_scale_is_drawn_equally_often(decimals: int) -> None:
    """Both rewards lie below the scale, so that nothing is left out: each goal comes as often as the others."""
    scale = RewardScale(1, 10, decimals)
    count = 9 * 10**decimals + 1
    pairs = [replace(ONE, id=str(i), rewards=(0.0, -1.0)) for i in range(40 * count)]
    goals = Counter(one.goal for one in drawn(pairs, OverallGoal(scale), goals_per_pair=1))
    assert len(goals) == count
    assert {"1", "10"} <= goals.keys()
    chi_squared = sum((seen - 40) ** 2 / 40 for seen in goals.values())
    assert chi_squared < count + 4 * (2 * count) ** 0.5


@pytest.mark.parametrize(
    "goal",
    [OverallGoal(), OverallGoal(RewardScale(1, 10, 0)), OverallGoal(SCALES[3])],
    ids=["tenths", "whole", "quantiles"],
)
@pytest.mark.parametrize("options", [{}, {"best_goal": True}, {"mode": "chosen", "keep_original": True}])
def test_no_prompt_is_repeated_or_contradicted_and_what_is_left_out_is_counted(
    goal: GoalTemplate, options: dict[str, Any]
) -> None:
    made = Relabelling(goals_per_pair=20, **options)
    left_out = 0
    for pair in random_pairs(60):
        if is_tie(goal, pair.rewards, pair.attributes):
            continue
        halves = list(RelabelledView([pair], goal, made))
        texts = [one.goal_text for one in halves]
        assert len(set(texts)) == len(texts)
        middle = goal.scale.goal(sum(pair.rewards) / 2)
        assert goal.text(middle) not in [one.goal_text for one in halves if one.origin in DRAWN]
        of_pair = draw_goals(pair, goal, made)
        assert len(of_pair.made) + len(of_pair.left_out) == 20
        assert sum(one.origin in DRAWN for one in halves) == len(of_pair.made)
        left_out += len(of_pair.left_out)
    rows = scored_rows(30)
    pairs, report = pairs_of(rows, goal=goal, relabelling=made)
    counted = sum(tally.count for reason, tally in report.noted.items() if "drawn goal" in reason)
    assert counted == sum(len(draw_goals(pair, goal, made).left_out) for pair in pairs) > 0
    assert left_out > 60


def test_a_draw_depends_on_seed_pair_and_number_alone() -> None:
    pairs = random_pairs(40)
    key = lambda one: (one.pair_id, one.origin, one.goal)  # noqa: E731
    found = [key(one) for one in drawn(pairs, OverallGoal())]
    assert sorted(found) == sorted(key(one) for one in drawn(pairs[::-1], OverallGoal()))
    assert set(found) > {key(one) for one in drawn(pairs, OverallGoal(), goals_per_pair=3)}, "the first three stay"
    assert len(set(found) & {key(one) for one in drawn(pairs, OverallGoal(), seed=1)}) < len(found) / 4
    again = [draw_goals(replace(ONE, id="p", rewards=(9.0, 2.0)), OverallGoal(), Relabelling(goals_per_pair=4))]
    printed = [f"{made.drawn:g}" for made in again[0].made]
    assert printed == ["2.8", "9.2", "8.3", "5.4"], "in every version, or resumed runs would see other goals"


def test_ties_get_none() -> None:
    tie = replace(ONE, tie=True, rewards=(5.0, 5.0))
    made = Relabelling(keep_original=True, goals_per_pair=5)
    assert [one.origin for one in RelabelledView([tie], OverallGoal(), made)] == ["chosen-goal", "unconditioned"]


def test_attributes_and_strengths_of_a_drawn_goal_are_those_of_the_goal() -> None:
    pair = replace(ONE, rewards=(8.0, 3.0), attributes=((2.0,), (5.0,)))
    attributes = AttributeGoal(["kind"])
    for one in drawn([pair], attributes):
        reward = one.goal_reward
        assert one.goal_text == attributes.text(reward, (reward,))
    strength = AdapterStrength(neutral=4.0)
    found = drawn(random_pairs(20), strength)
    assert [one.strength for one in found] == [strength.strength(one.goal_reward) for one in found]
    assert {one.goal_text for one in found} == {None}
    assert min(one.strength for one in found) < -0.5 < 0.5 < max(one.strength for one in found)


@pytest.mark.parametrize("goal", [OverallGoal(), AdapterStrength(neutral=4.0)], ids=["text", "strength"])
def test_encoded_pairs_hold_each_drawn_goal_in_its_own_place(goal: GoalTemplate) -> None:
    made = Relabelling(goals_per_pair=4, keep_original=not isinstance(goal, AdapterStrength))
    tokenizer = make_tokenizer("chatml")
    rows = scored_rows(20)
    table, report, _ = encode(tokenizer, rows, goal=goal, relabelling=made)
    view = list(RelabelledView(pairs_of(rows, goal=goal, relabelling=made)[0], goal, made))
    assert len(table) == report.relabelled == len(view) > 100
    assert [table.example(i).size for i in range(len(table))] == table.sizes()
    for i, one in enumerate(view):
        example = table.example(i)
        assert (example.goal, example.goal_reward, example.strength) == pytest.approx(
            (one.goal, one.goal_reward, one.strength), nan_ok=True
        )
        assert example.rewards == one.rewards
        assert one.chosen in tokenizer.decode(example.chosen_ids)
        if one.goal_text is not None:
            assert f"Overall score: {one.goal}." in tokenizer.decode(example.prompt_ids)
    parallel, _, _ = encode(tokenizer, rows, goal=goal, relabelling=made, num_proc=2)
    assert parallel.digest() == table.digest()
    other, _, _ = encode(tokenizer, rows, goal=goal, relabelling=replace(made, seed=1))
    assert other.digest("goals") != table.digest("goals"), "a resumed run must see that its goals have changed"


def test_soft_labels_of_drawn_goals_are_the_distances_of_the_rewards() -> None:
    """sigma((|g - r_l|^2 - |g - r_w|^2) / T), which is 2 (r_w - r_l) (g - midpoint) / T: never below a half."""
    found = drawn(random_pairs(50), OverallGoal(SCALES[3]))
    rewards = PairRewards(
        torch.tensor([one.rewards[0] for one in found]), torch.tensor([one.rewards[1] for one in found]),
        torch.tensor([one.goal_reward for one in found]),
    )  # fmt: skip
    gap = SoftLabelDPO(1.0, temperature=4.0, distance="squared").gap(rewards)
    straight = [2 * (w - r) * (one.goal_reward - (w + r) / 2) for one in found for w, r in [one.rewards]]
    torch.testing.assert_close(gap, torch.tensor(straight), rtol=1e-4, atol=1e-4)
    assert (gap > 0).all()


def test_training_on_drawn_goals_streams_weighs_and_resumes(tiny: Path, tmp_path: Path) -> None:
    """One step over all pairs: table and stream agree, and a resumed run ends with the weights of the whole one."""
    data = stream_folder(tmp_path)
    options = {"goals_per_pair": 2, "rejected_weight": 0.5, "best_goal": True, "loss": SoftLabelDPO(distance="squared")}
    once: dict[str, Any] = {"max_steps": 1, "accumulate_grad_batches": 40, **options}
    streamed = run(tiny, data, tmp_path / "a", shuffle_buffer=1, **once)
    table = run(tiny, data, tmp_path / "b", streaming=False, **once)
    for name, value in streamed.items():
        torch.testing.assert_close(value, table[name], rtol=1e-5, atol=1e-6)
    saves = ModelCheckpoint(tmp_path / "all", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    more: dict[str, Any] = {"max_steps": 5, "streaming": False, "accumulate_grad_batches": 1}
    whole = run(tiny, data, tmp_path / "c", callbacks=[saves], enable_checkpointing=True, **more, **options)
    rest = more | {"ckpt": str(tmp_path / "all" / "step=3.ckpt")}
    assert same(run(tiny, data, tmp_path / "d", **rest, **options), whole)
    with pytest.raises(ConfigError, match="had other rewards, goals"):
        run(tiny, data, tmp_path / "e", **rest, **(options | {"goals_per_pair": 3}))
    assert {f"loss/{origin}" for origin in ORIGINS if origin != "unconditioned"} <= logged(tmp_path / "b")[0].keys()


def test_relabel_and_inspect_show_drawn_goals(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    data = stream_folder(tmp_path)
    done = run_command("relabel", "--source", data, "--output", tmp_path / "out", "--goals_per_pair", 3)
    assert done.returncode == 0, done.stderr
    rows = [row for file in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    origins = Counter(row["origin"] for row in rows)
    assert origins["upper-goal"] > 10
    assert origins["lower-goal"] > 10
    for row in rows:
        distance = [abs(float(row["goal"]) - row[f"reward_{side}"]) for side in ("chosen", "rejected")]
        assert distance[0] < distance[1]
        assert f"Overall score: {row['goal']}." in row["prompt"][0]["content"]
    assert "upper-goal" in (tmp_path / "out" / "README.md").read_text()
    done = run_command("inspect", "--source", data, "--goals_per_pair", 3, "--examples", 2)
    assert "-- upper-goal, goal" in done.stdout + done.stderr
    shown = run_command("inspect", "--source", data, "--goals_per_pair", 90).stdout
    assert "no pair under a drawn goal" in shown


def test_drawn_goals_without_effect_or_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match="goals_per_pair has no effect with relabel none"):
        Relabelling("none", goals_per_pair=1)
    with pytest.raises(ConfigError, match="goals_per_pair must be at least 0, found -1"):
        Relabelling(goals_per_pair=-1)

    class Squared(RewardScale):
        def goal(self, reward: float) -> float:
            return reward**2

    class Invertible(Squared):
        def reward(self, goal: float) -> float:
            return goal**0.5

    class Narrower(LinearScale):
        def goal(self, reward: float) -> float:
            return 2.0

    made = Relabelling(goals_per_pair=1)
    for scale in (Squared(), Narrower(judge_low=0, judge_high=1)):
        with pytest.raises(ConfigError, match=rf"{type(scale).__name__} doesn't say (?s:.*)reward\(goal\)"):
            pairs_of(scored_rows(2), goal=OverallGoal(scale), relabelling=made)
    for one in drawn(random_pairs(20, 1, 3), OverallGoal(Invertible())):
        assert float(one.goal) == pytest.approx(one.goal_reward**2, abs=0.051)


def test_the_view_of_a_round_draws_with_the_seed_of_its_fit() -> None:
    assert data_seed({"data": {"seed": 7}}) == 7
    assert data_seed({"data": {"class_path": "PreferenceDataModule", "init_args": {"seed": 8}}}) == 8
    assert data_seed({}) == 42
