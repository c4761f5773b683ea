"""The figures of evaluate, each by another road: by hand, by the repeated sample, by least squares."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from rap_lightning.evaluation import (
    Bootstrap,
    Responses,
    Samples,
    bins_of,
    controllability,
    discrimination,
    extrapolation,
    length,
    read_off,
    statistics,
    unlearning,
)
from rap_lightning.evaluation.response_figures import bin_numbers

GOALS = [1.0, 4.0, 7.0, 10.0]


def plain_ranks(values: Any) -> list[float]:
    """1-based, ties at the mean of their places: straight from the definition."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def plain_spearman(x: Any, y: Any) -> float:
    return float(np.corrcoef(plain_ranks(x), plain_ranks(y))[0, 1])


def repeated(values: Any, weights: Any) -> Any:
    return np.repeat(values, weights.astype(int))


def random_samples(seed: int, prompts: int = 12, per_goal: int = 3) -> Samples:
    rng = np.random.default_rng(seed)
    rows = [
        (f"p{p}", g, float(np.round(2 * np.clip(rng.normal(0.6 * g + 2, 2), 1, 10)) / 2), int(rng.integers(3, 60)))
        for p in range(prompts)
        for g in GOALS
        for _ in range(per_goal)
    ]
    return Samples(*map(list, zip(*rows, strict=True)))


# -- statistics -------------------------------------------------------------------------------------------------------


def test_spearman_takes_the_middle_of_tied_ranks() -> None:
    x, y = [1.0, 2.0, 2.0, 3.0, 5.0, 5.0], [2.0, 1.0, 4.0, 4.0, 4.0, 7.0]
    # ranks 1 2.5 2.5 4 5.5 5.5 and 2 1 4 4 4 6; centred at 3.5, products sum to 12, squares to 16.5 and 15.5
    by_hand = 12 / math.sqrt(16.5 * 15.5)
    found = statistics.spearman(np.array(x), np.array(y), np.ones((1, 6)))[0]
    assert found == pytest.approx(by_hand, abs=1e-12)
    assert found == pytest.approx(plain_spearman(x, y), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_statistics_are_those_of_the_repeated_sample(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 5, 30).astype(float), rng.integers(0, 7, 30).astype(float)
    lengths, goal = rng.integers(1, 40, 30).astype(float), rng.integers(0, 3, 30)
    weights = rng.integers(0, 4, (1, 30)).astype(float)
    a, b = repeated(x, weights[0]), repeated(y, weights[0])
    assert statistics.spearman(x, y, weights)[0] == pytest.approx(plain_spearman(list(a), list(b)), abs=1e-12)
    assert statistics.slope(x, y, weights)[0] == pytest.approx(np.polyfit(a, b, 1)[0], abs=1e-10)
    means = statistics.means_by_goal(y, weights, goal, 3)[0]
    of_goal = repeated(goal, weights[0])
    assert means == pytest.approx([b[of_goal == g].mean() for g in range(3)], abs=1e-12)
    controlled, per_log = statistics.length_controlled(y, lengths, weights, goal, 3)
    logs = np.log(repeated(lengths, weights[0]))
    design = np.column_stack([*(of_goal == g for g in range(3)), logs]).astype(float)
    effects = np.linalg.lstsq(design, b, rcond=None)[0]
    assert per_log[0] == pytest.approx(effects[3], abs=1e-8)
    assert controlled[0] == pytest.approx(effects[:3] + effects[3] * logs.mean(), abs=1e-8)


def test_what_does_not_vary_has_no_correlation() -> None:
    ones, ramp, weights = np.full(6, 0.1), np.arange(6.0), np.ones((1, 6))
    assert math.isnan(statistics.spearman(ramp, ones, weights)[0])
    assert math.isnan(statistics.slope(ones, ramp, weights)[0])
    assert math.isnan(statistics.length_controlled(ramp, ones + 4, weights, np.zeros(6, int), 1)[1][0])
    assert math.isnan(statistics.curve_spearman(np.arange(3.0), np.full((1, 3), 0.3))[0])


def test_the_curves_spearman_is_that_of_its_points() -> None:
    means = np.array([[1.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, np.nan, 4.0]])
    found = statistics.curve_spearman(np.array(GOALS), means)
    assert found[0] == pytest.approx(plain_spearman(GOALS, list(means[0])), abs=1e-12)
    assert found[1] == pytest.approx(-1, abs=1e-12)
    assert math.isnan(found[2])


def test_ties_share_the_highest_place() -> None:
    shares = statistics.highest_shares(np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 1.0], [np.nan, 1.0, 2.0]]))
    assert shares == pytest.approx([0.5, 0.25, 0.25])


# -- the bootstrap ----------------------------------------------------------------------------------------------------


def test_the_interval_is_of_prompts_not_of_samples() -> None:
    """A prompt's samples ten times over are no new prompts; taken for such, they would narrow it to a third."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 40)
    once = Bootstrap(range(40)).figure(lambda w: statistics.mean(values, w), "none")
    many = np.repeat(values, 10)
    tenfold = Bootstrap([i // 10 for i in range(400)]).figure(lambda w: statistics.mean(many, w), "none")
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert once.n == tenfold.n == 40
    error = values.std() / 40**0.5
    assert once.low is not None
    assert once.high is not None
    assert once.high - once.low == pytest.approx(2 * 1.96 * error, rel=0.1), "near the normal interval of a mean"


def test_the_interval_is_that_of_resampled_prompts_by_hand() -> None:
    values, prompts = np.array([1.0, 2.0, 6.0, 3.0, 9.0]), ["a", "a", "b", "c", "c"]
    bootstrap = Bootstrap(prompts, resamples=200, seed=3)
    figure = bootstrap.figure(lambda w: statistics.mean(values, w), "none")
    rng = np.random.default_rng(3)
    groups = [values[:2], values[2:3], values[3:]]
    means = [
        np.concatenate([group for group, k in zip(groups, counts, strict=True) for _ in range(k)]).mean()
        for counts in rng.multinomial(3, [1 / 3] * 3, size=200)
    ]
    assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    assert figure.value == pytest.approx(4.2)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        values = rng.normal(5, 2, 60)
        figure = Bootstrap(range(60), resamples=400).figure(partial(statistics.mean, values), "none")
        hits += figure.low is not None and figure.high is not None and figure.low <= 5 <= figure.high
    assert 0.88 <= hits / 200 <= 0.99


def test_what_cannot_be_computed_says_why() -> None:
    one = Bootstrap(["a", "a"]).figure(lambda w: statistics.mean(np.array([1.0, 3.0]), w), "none")
    assert (one.value, one.low, one.n) == (2.0, None, 1)
    assert "one prompt" in str(one.why)
    nothing = Bootstrap([]).figure(lambda w: statistics.mean(np.array([]), w), "no samples")
    assert nothing.as_dict() == {"value": None, "low": None, "high": None, "n": 0, "why": "no samples"}


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_policy_that_gives_the_goal_is_steered_perfectly() -> None:
    rows = [(p, g, g, 10) for p in range(8) for g in GOALS for _ in range(2)]
    found = controllability(Samples(*map(list, zip(*rows, strict=True))), GOALS)
    for name in ("spearman", "spearman_samples", "slope"):
        assert found[name]["value"] == pytest.approx(1, abs=1e-9)
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((1, 1), abs=1e-9)
    assert [figure["value"] for figure in found["mean"]] == GOALS
    assert found["argmax"] == {"goal": 10.0, "shares": [0.0, 0.0, 0.0, 1.0]}


def test_controllability_by_hand() -> None:
    samples = random_samples(0)
    found = controllability(samples, GOALS)
    scores = np.array(samples.scores)
    means = [scores[np.array(samples.goals) == g].mean() for g in GOALS]
    assert [figure["value"] for figure in found["mean"]] == pytest.approx(means)
    assert found["spearman"]["value"] == pytest.approx(plain_spearman(GOALS, means))
    assert found["spearman_samples"]["value"] == pytest.approx(plain_spearman(samples.goals, samples.scores))
    assert found["slope"]["value"] == pytest.approx(np.polyfit(np.array(samples.goals, dtype=float), scores, 1)[0])
    assert found["argmax"]["goal"] == GOALS[int(np.argmax(means))]
    assert sum(found["argmax"]["shares"]) == pytest.approx(1)
    assert found["slope"]["low"] < found["slope"]["value"] < found["slope"]["high"]


def test_samples_without_a_goal_have_a_mean_and_no_part_in_the_curve() -> None:
    plain = random_samples(1)
    rows = [(p, None, 9.0, 5) for p in dict.fromkeys(plain.prompts)]
    columns = [list(a) + list(b) for a, b in zip(
        (plain.prompts, plain.goals, plain.scores, plain.tokens), zip(*rows, strict=True), strict=True
    )]  # fmt: skip
    found, without = controllability(Samples(*columns), [None, *GOALS]), controllability(plain, GOALS)
    assert found["mean"][0]["value"] == 9
    for name in ("spearman", "spearman_samples", "slope"):
        assert found[name]["value"] == pytest.approx(without[name]["value"])
    assert found["argmax"]["shares"][0] is None
    alone = controllability(Samples(*map(list, zip(*rows, strict=True))), [None])
    assert alone["spearman"]["value"] is None
    assert "two goals" in alone["spearman"]["why"]


def test_extrapolation_counts_what_training_did_not_show() -> None:
    samples = Samples(["a", "a", "b", "c"], [10.0] * 4, [7.0, 8.5, 6.0, 9.5], [1] * 4)
    found = extrapolation(samples, [10.0], {"a": 8.5, "b": 6.0}, {"c": 9.6}, 9.0, 10.0)
    assert found["best_seen"][0]["value"] == pytest.approx(2 / 3), "at or above; c is not in training"
    assert found["best_seen"][0]["n"] == 2
    assert found["best_known"][0]["value"] == 0
    assert found["p99"]["score"] == 9.0
    assert found["p99"]["share"][0]["value"] == pytest.approx(1 / 4)
    unknown = extrapolation(samples, [10.0], {}, {}, 10.0, 10.0)
    assert unknown["best_seen"][0]["value"] is None
    assert "in training" in unknown["best_seen"][0]["why"]
    assert "nothing lies above" in unknown["p99"]["share"][0]["why"]


def test_a_win_by_length_is_visible() -> None:
    """Scores are log-length alone: what looks like steering is gone at one length."""
    rng = np.random.default_rng(2)
    rows = []
    for prompt in range(40):
        for goal in GOALS:
            tokens = int(rng.integers(5, 20) * goal)
            rows.append((prompt, goal, math.log2(tokens), tokens))
    samples = Samples(*map(list, zip(*rows, strict=True)))
    raw = [figure["value"] for figure in controllability(samples, GOALS)["mean"]]
    found = length(samples, GOALS)
    level = [figure["value"] for figure in found["controlled"]]
    assert raw[-1] - raw[0] > 3
    assert max(level) - min(level) == pytest.approx(0, abs=1e-9)
    assert found["slope"]["value"] == pytest.approx(1), "a point for each doubling"


def test_bins_are_of_equal_width_and_hold_their_ends() -> None:
    bins = bins_of(1, 10, 3)
    assert bins == [(1, 4), (4, 7), (7, 10)]
    assert list(bin_numbers([1, 3.9, 4, 7, 10, 0, 11], bins)) == [0, 0, 1, 2, 2, 0, 2]


def test_unlearning_by_hand() -> None:
    responses = Responses(["a", "a", "b", "b", "b", "b"], [9, 8, 3, 2, 8, 2], [4, 2, 2, 5, 4, 10])
    changes = {"none": [1.0, -6.0, 2.0, -5.0, 3.0, -1.0], "best": [0.0] * 6}
    found = unlearning(responses, changes, bins_of(1, 10, 3))
    none = found["conditions"]["none"]
    assert [figure["value"] for figure in none["chosen"]] == [2.0, None, 2.0]
    assert [figure["value"] for figure in none["rejected"]] == [-3.0, None, -6.0]
    per_token = found["per_token"]["none"]
    assert [figure["value"] for figure in per_token["rejected"]] == pytest.approx([-(1.0 + 0.1) / 2, None, -3.0])
    assert "no rejected response" in none["rejected"][1]["why"]
    assert none["chosen"][2]["n"] == 2
    assert none["rejected"][2]["n"] == 1
    assert found["bins"] == [[1, 4], [4, 7], [7, 10]]


def test_discrimination_of_a_policy_that_knows() -> None:
    rng = np.random.default_rng(0)
    rewards = [float(r) for r in rng.choice(GOALS, 40)]
    logps = -np.abs(np.array(rewards)[:, None] - np.array(GOALS)) - 50
    responses = Responses([i // 4 for i in range(40)], rewards, [5] * 40)
    found = discrimination(responses, logps, GOALS)
    assert found["spearman"]["value"] == pytest.approx(1)
    assert found["pair_accuracy"]["value"] == 1
    assert list(read_off(logps, np.array(GOALS))) == rewards
    # a goal that lifts every text wins everywhere, until it is centred away
    lifted = discrimination(responses, logps + np.array([0, 0, 0, 100.0]), GOALS)
    assert lifted["spearman"]["value"] is None
    assert lifted["pair_accuracy"]["value"] == 0.5
    assert lifted["centred"]["spearman"]["value"] == pytest.approx(found["centred"]["spearman"]["value"])
    assert lifted["centred"]["spearman"]["value"] > 0.9


def test_pairs_that_the_judge_finds_equal_are_left_out_of_the_accuracy() -> None:
    responses = Responses(["a", "a", "b", "b", "c", "c"], [5, 5, 7, 4, 10, 1], [1] * 6)
    logps = np.array([[0, 1], [1, 0], [1, 1], [1, 1], [1, 0], [0, 1]], dtype=float)  # a tie, and a wrong one
    found = discrimination(responses, logps, [1.0, 10.0])
    assert found["pair_accuracy"]["value"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["pair_accuracy"]["n"] == 2
