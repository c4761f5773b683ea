"""Reward scales: ends, ranks and what a scale refuses; numbers that say how to make it again."""

from typing import Any

import pytest

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale, for_unbounded

SCALES = [
    RewardScale(), RewardScale(0, 5, 2), LinearScale(0, 5, judge_low=-3, judge_high=1), LinearScale(judge_low=2),
    QuantileScale(), QuantileScale(0, 1, 3, [1.0, 2.0, 4.0]),
]  # fmt: skip


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_a_scale_is_made_again_from_its_numbers_and_from_how_it_prints(scale: RewardScale) -> None:
    names = {kind.__name__: kind for kind in (RewardScale, LinearScale, QuantileScale)}
    for again in (type(scale)(**scale.numbers()), eval(repr(scale), names)):
        assert again == scale
        assert hash(again) == hash(scale)
        assert again.numbers() == scale.numbers()


def test_scales_are_equal_by_kind_and_numbers() -> None:
    assert all((a == b) is (a is b) for a in SCALES for b in SCALES)
    assert len({hash(scale) for scale in SCALES}) == len(SCALES)
    assert RewardScale(1, 10, 1) == RewardScale(1.0, 10.0) == RewardScale()
    assert RewardScale() != repr(RewardScale())
    assert LinearScale(judge_low=None) != RewardScale()
    assert RewardScale(1, 5).numbers() == {"low": 1.0, "high": 5.0, "decimals": 1}
    assert all(isinstance(RewardScale(1, 5).numbers()[end], float) for end in ("low", "high"))


def test_a_declared_scale_holds_its_ends_and_nothing_beyond() -> None:
    scale = RewardScale(0, 5)
    assert 0 in scale
    assert 5 in scale
    assert 5.01 not in scale
    assert -0.01 not in scale
    assert not scale.needs_fit
    with pytest.raises(ConfigError, match="RewardScale has nothing to fit"):
        scale.fit([1.0, 2.0])


@pytest.mark.parametrize("scale", [LinearScale(judge_low=0.0, judge_high=1.0), QuantileScale(knots=[0.0, 1.0])])
def test_every_reward_belongs_to_a_scale_that_maps_rewards(scale: RewardScale) -> None:
    assert all(reward in scale for reward in (-1e300, 0.5, 1e300, float("inf"), float("-inf")))
    assert scale.judge_range == (float("-inf"), float("inf"))


@pytest.mark.parametrize("decimals", [0, 6])
def test_no_decimals_and_six_are_allowed_and_seven_are_not(decimals: int) -> None:
    assert RewardScale(decimals=decimals).printed(2.3456789) == {0: "2", 6: "2.345679"}[decimals]
    with pytest.raises(ConfigError, match="decimals must be from 0 to 6, found 7"):
        RewardScale(decimals=7)


def test_a_linear_scale_stretches_the_judges_range() -> None:
    scale = LinearScale(0, 5, judge_low=-20, judge_high=5)
    found = {reward: scale.goal(reward) for reward in (-25.0, -20.0, -15.0, 0.0, 5.0, 6.0)}
    assert found == {-25.0: 0.0, -20.0: 0.0, -15.0: 1.0, 0.0: 4.0, 5.0: 5.0, 6.0: 5.0}
    assert scale.best == 5
    assert LinearScale(2, 4, judge_low=0, judge_high=1).goal(0.25) == 2.5
    assert QuantileScale().numbers() == {"low": 1.0, "high": 10.0, "decimals": 1, "knots": None}
    assert LinearScale().numbers() == {"low": 1.0, "high": 10.0, "decimals": 1, "judge_low": None, "judge_high": None}


@pytest.mark.parametrize(
    ("ends", "fitted"),
    [
        ({}, (-2.0, 7.0)),
        ({"judge_low": -5}, (-5.0, 7.0)),
        ({"judge_high": 9}, (-2.0, 9.0)),
        ({"judge_low": 0.0}, (0.0, 7.0)),
    ],
)
def test_only_open_ends_are_taken_from_the_rewards(ends: dict[str, float], fitted: tuple[float, float]) -> None:
    scale = LinearScale(**ends)  # type: ignore[arg-type]
    assert scale.needs_fit
    with pytest.raises(AssertionError, match="call fit first"):
        scale.goal(3.0)
    scale.fit([3, 7, -2, 0])
    assert not scale.needs_fit
    assert (scale.judge_low, scale.judge_high) == fitted
    assert isinstance(scale.judge_low, float)
    assert isinstance(scale.judge_high, float)
    assert not LinearScale(judge_low=0, judge_high=1).needs_fit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScale(judge_low=1, judge_high=1), "judge_low must be below judge_high, found 1 and 1"),
        (lambda: LinearScale(judge_low=2, judge_high=1), "judge_low must be below judge_high"),
        (lambda: LinearScale().fit([4.0, 4.0]), "give no range: from 4.0 to 4.0"),
        (lambda: LinearScale(judge_low=5).fit([4.0, 5.0]), "give no range"),
        (lambda: QuantileScale().fit([4.0, 4.0]), "all rewards of the training split are 4"),
        (lambda: QuantileScale(knots=[1.0]), "at least two numbers"),
        (lambda: QuantileScale(knots=[]), "at least two numbers"),
        (lambda: QuantileScale(knots=[2.0, 1.0, 3.0]), "in rising order"),
        (lambda: QuantileScale(knots=[1.0, 1.0]), "not all the same"),
        (lambda: QuantileScale().goal(1.0), "call fit first"),
    ],
)
def test_scales_that_rank_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises((ConfigError, AssertionError), match=message):
        make()


def test_a_quantile_scale_of_two_knots_is_a_line_between_them() -> None:
    scale = QuantileScale(0, 8, knots=[10.0, 20.0])
    assert [scale.goal(r) for r in (9.0, 10.0, 12.5, 20.0, 21.0)] == [0.0, 0.0, 2.0, 8.0, 8.0]


def test_a_reward_between_unequal_knots_stands_between_their_ranks() -> None:
    scale = QuantileScale(0, 4, knots=[0.0, 1.0, 1.0, 1.0, 11.0])
    assert scale.goal(0.5) == 0.5
    assert scale.goal(1.0) == 2.0, "in the middle of the three knots that share it"
    assert scale.goal(6.0) == 3.5
    assert scale.goal(11.0) == 4.0
    assert scale.best == 4.0


def test_the_best_of_a_quantile_scale_is_what_training_can_have_stated() -> None:
    assert QuantileScale().best == 10.0, "before it is fitted, the scale's end"
    crowded = QuantileScale(0, 4, knots=[0.0, 1.0, 2.0, 2.0, 2.0])
    assert crowded.best == crowded.goal(2.0) == 3.0


def test_knots_are_the_rewards_at_equally_spaced_quantiles() -> None:
    scale = QuantileScale()
    scale.fit([float(i) for i in range(300, -1, -1)])
    assert scale.knots == [3.0 * i for i in range(101)]
    few = QuantileScale()
    few.fit([5.0, 1.0])
    assert few.knots is not None
    assert len(few.knots) == 101
    assert few.knots.count(1.0) == 51  # round half to even
    assert few.knots.count(5.0) == 50


def test_judges_without_a_range_are_ranked_on_the_same_numbers() -> None:
    assert for_unbounded(RewardScale(0, 5, 2)) == QuantileScale(0, 5, 2)
    own = LinearScale(judge_low=-1, judge_high=1)
    assert for_unbounded(own) is own


def test_decimals_and_a_low_end_other_than_zero_are_kept_by_scales_that_map() -> None:
    linear, ranks = LinearScale(2, 4, 3, 0.0, 10.0), QuantileScale(2, 4, 3, [0.0, 10.0])
    for scale in (linear, ranks):
        assert scale.goal(5.0) == 3.0
        assert scale.printed(2.12345) == "2.123"


def test_rewards_that_share_the_lowest_value_still_make_ranks() -> None:
    scale = QuantileScale(knots=[1.0, 1.0, 2.0])
    assert scale.needs_fit is False
    fitted = QuantileScale()
    fitted.fit([2.0, 1.0, 1.0])
    assert fitted.needs_fit is False
    assert fitted.goal(2.0) > fitted.goal(1.0)
