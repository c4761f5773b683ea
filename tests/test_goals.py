"""Goals read exactly as in the paper, and the scale refuses what makes no sense."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from conftest import ROOT
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goal_spec import Number, Wording
from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal, StatedGoal
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale


def test_the_goal_text_is_the_papers_byte_for_byte() -> None:
    expected = (
        "You are an assistant that generates responses for the instruction while implicitly achieving the following "
        "target scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: 7.5."
    )
    assert OverallGoal().text(7.5) == expected
    assert OverallGoal().text(8.0).endswith("Overall score: 8.")


@pytest.mark.parametrize(
    ("reward", "decimals", "printed"),
    [(10.0, 1, "10"), (7.46, 1, "7.5"), (100.0, 0, "100"), (-0.04, 1, "0"), (0.125, 3, "0.125"), (20.0, 2, "20")],
)
def test_rewards_print_without_trailing_zeros_and_keep_whole_tens(reward: float, decimals: int, printed: str) -> None:
    assert RewardScale(-100, 100, decimals).printed(reward) == printed


def test_the_best_goal_is_the_top_of_the_scale() -> None:
    assert OverallGoal(RewardScale(0, 5)).best == 5
    assert "on a scale of 0-5" in OverallGoal(RewardScale(0, 5)).text(1)


@pytest.mark.parametrize("arguments", [{"low": 5, "high": 5}, {"low": 9, "high": 1}, {"decimals": -1}])
def test_an_impossible_scale_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="reward scale"):
        RewardScale(**arguments)


LEAD = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the following "
    "target scores (on a scale of {}, where {} is lowest and {} is highest):"
)
SEVERAL = AttributeGoal(["helpfulness", "honest_y"], RewardScale(0, 100, 0), RewardScale(1, 5, 2))


def test_attributes_stand_a_line_each_on_their_own_scale_then_the_overall_score() -> None:
    goal, attributes = SEVERAL.goal_of(72.6, (4.125, 2))
    assert SEVERAL.write(goal, attributes) == (
        f"{LEAD.format('1-5', 1, 5)}\nHelpfulness: 4.12.\nHonest y: 2.\nOverall score: 73."
    )
    assert SEVERAL.printed(goal, attributes) == "4.12 2 73"
    assert (SEVERAL.best, SEVERAL.best_attributes, SEVERAL.attributes_at(0)) == (100, (5, 5), (1, 1))
    alone = AttributeGoal(["helpfulness", "honest_y"], RewardScale(0, 100, 0), RewardScale(1, 5, 2), overall=False)
    assert alone.write(goal, attributes) == SEVERAL.write(goal, attributes).rpartition("\n")[0]
    assert alone.printed(goal, attributes) == "4.12 2"
    with pytest.raises(ValueError, match="zip"):
        SEVERAL.text(goal, attributes[:1])


def test_attributes_without_a_scale_of_their_own_are_on_the_overall_one() -> None:
    goal = AttributeGoal(["kind"], RewardScale(0, 3))
    assert goal.attribute_scale is goal.scale
    assert (goal.placement, AttributeGoal(["kind"], placement="user").placement) == ("auto", "user")
    mapped = AttributeGoal(["kind"], attribute_scale=LinearScale(0, 1, judge_low=-4, judge_high=4))
    assert mapped.goal_of(9, (2,)) == (9, (0.75,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attributes": []}, "different names, at least one"),
        ({"attributes": ["a", "b", "a"]}, "different names, at least one"),
        ({"attributes": ["a"], "attribute_scale": QuantileScale()}, "declared in full"),
        ({"attributes": ["a"], "attribute_scale": LinearScale(judge_low=0)}, "declared in full"),
        ({"attributes": ["a"], "scale": QuantileScale()}, "QuantileScale maps the overall reward"),
        ({"attributes": ["a"], "scale": LinearScale(judge_low=0, judge_high=1)}, "LinearScale maps the overall reward"),
    ],
)
def test_attributes_that_could_not_be_stated_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttributeGoal(**arguments)  # type: ignore[arg-type]


class Worded(GoalTemplate):
    """A user's own: it takes the goal alone."""

    def text(self, goal: float) -> str:  # type: ignore[override]
        return f"Be {'good' if goal > 5 else 'bad'}."


def test_a_template_that_takes_the_goal_alone_needs_no_attributes() -> None:
    goal = Worded(placement="user")
    assert goal.write(7, (1.0, 2.0)) == "Be good."
    assert (goal.scale, goal.placement, Worded().placement) == (RewardScale(), "user", "auto")
    assert goal.goal_of(3.5, [1]) == (3.5, (1,))
    assert (goal.best, goal.best_attributes, goal.attributes_at(0)) == (10, (), ())
    assert goal.printed(7.0) == "7"
    assert goal.wording() is None
    assert goal.record() == {
        "template": f"{__name__}.Worded",
        "scale": {"class": "RewardScale", "low": 1.0, "high": 10.0, "decimals": 1},
        "placement": "user", "attributes": [], "best": "Be good.", "wording": None,
    }  # fmt: skip


def test_the_low_goal_may_be_any_number_of_the_scale_its_ends_included() -> None:
    for option in (1, 10, 4.5):
        assert OverallGoal().low(option) == (StatedGoal(OverallGoal().text(option)), f"{option:g}")
        assert SEVERAL.low(option) == (StatedGoal(SEVERAL.text(option, (5, 5))), f"5 5 {round(option):g}")
    assert SEVERAL.low() == (StatedGoal(SEVERAL.text(0, (1, 1))), "1 1 0")
    assert SEVERAL.low("none") == (StatedGoal(), "none")
    for outside in (0.99, 10.01):
        with pytest.raises(ConfigError, match="against must be on the scale from 1 to 10"):
            OverallGoal().low(outside)


def test_the_record_of_attributes_holds_both_scales_and_the_wording() -> None:
    record = SEVERAL.record()
    assert record["scale"] == {"class": "RewardScale", "low": 0.0, "high": 100.0, "decimals": 0}
    assert record["attribute_scale"] == {"class": "RewardScale", "low": 1.0, "high": 5.0, "decimals": 2}
    assert (record["attributes"], record["overall"]) == (["helpfulness", "honest_y"], True)
    assert record["template"] == "rap_lightning.preferences.goals.AttributeGoal"
    assert (record["placement"], record["best"]) == ("auto", SEVERAL.text(100, (5, 5)))
    wording = Wording.of(record["wording"])
    assert wording == SEVERAL.wording()
    assert wording.alone == "overall"
    assert wording.numbers == (
        Number("helpfulness", 1, 5, 2, 5), Number("honest_y", 1, 5, 2, 5), Number("overall", 0, 100, 0, 100)
    )  # fmt: skip
    assert wording.text({"overall": 40, "honest_y": 2.5}) == SEVERAL.text(40, (5, 2.5))
    assert wording.text({}) == SEVERAL.text(100, (5, 5))
    alone = AttributeGoal(["a"], overall=False).wording()
    assert alone is not None
    assert alone.alone is None
    assert AttributeGoal(["overall"]).wording() is None, "two numbers of one name"
    assert AttributeGoal(["overall"]).record()["wording"] is None
    assert AttributeGoal(["overall"], overall=False).wording() is not None


class NearlyTheirs(OverallGoal):
    """Writes like its parent but for one stretch of the scale."""

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return super().text(goal) if not 9.9 < goal < 10 else "Be nearly perfect."


class BestApart(AttributeGoal):
    """Asks for less than it could at inference, and writes that otherwise than anything on the scale."""

    @property
    def best_attributes(self) -> tuple[float, ...]:
        return (4.9321,) * len(self.attributes)

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return super().text(goal, attributes) if 4.9321 not in attributes else "Be good."


class Exchanged(AttributeGoal):
    """States the second attribute's number where the first one's name is."""

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return super().text(goal, list(attributes)[::-1])


class Unasked(AttributeGoal):
    """Names an attribute and doesn't say its best."""

    best_attributes = ()  # type: ignore[assignment]

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        return "Be good."


def test_a_template_with_attributes_must_say_the_best_of_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        Unasked(["a"]).checked_wording()


class Partly(AttributeGoal):
    """States one of its two attributes, and the goal nowhere: both are asked for at their best."""

    def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
        assert (goal, attributes[1]) == (self.best, self.best_attributes[1])
        return f"Be {self.attribute_scale.printed(attributes[0])} kind."

    def wording(self) -> Wording:
        return Wording(("Be ", " kind."), (Number(self.attributes[0], 1, 10, 1, 10),), None)


def test_what_a_wording_leaves_out_is_asked_for_at_its_best() -> None:
    goal = Partly(["kind", "clear"])
    assert goal.checked_wording() == goal.wording()


def test_a_template_without_a_text_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        GoalTemplate()  # type: ignore[abstract]


@pytest.mark.parametrize("goal", [NearlyTheirs(), BestApart(["a"], RewardScale(1, 5)), Exchanged(["a", "b"])])
def test_a_wording_that_a_subclass_does_not_write_is_not_handed_on(goal: GoalTemplate) -> None:
    assert goal.wording() is not None
    assert goal.checked_wording() is None
    assert goal.record()["wording"] is None
    assert SEVERAL.checked_wording() == SEVERAL.wording()
    assert OverallGoal(RewardScale(-1, 1, 2)).checked_wording() == OverallGoal(RewardScale(-1, 1, 2)).wording()


def test_a_wording_is_words_around_numbers() -> None:
    low, high = Number("low", 0, 1, 1, 0.25), Number("high", 0, 10, 0, 9)
    wording = Wording(("from ", " to ", "!"), (low, high), None)
    assert wording.text({}) == "from 0.2 to 9!"
    assert wording.text({"high": 3, "other": 5}) == "from 0.2 to 3!"
    assert Wording.best(low) == wording.best(low) == "0.2"
    assert wording.record() == {
        "parts": ["from ", " to ", "!"], "alone": None,
        "numbers": [
            {"name": "low", "low": 0, "high": 1, "decimals": 1, "best": 0.25},
            {"name": "high", "low": 0, "high": 10, "decimals": 0, "best": 9},
        ],
    }  # fmt: skip
    assert Wording.of(wording.record()) == wording
    for parts, numbers in (
        (("a", "b"), (low, high)),
        (("a", "b", "c", "d"), (low, high)),
        (("a", "b", "c"), (low, low)),
    ):
        with pytest.raises(ConfigError, match="one more part than numbers, and numbers with different names"):
            Wording(parts, numbers, None)


def test_the_grid_runs_each_number_through_its_range_at_another_pace() -> None:
    numbers = (Number("a", 0, 4, 1, 4), Number("b", 10, 18, 1, 18))
    assert Wording(("", "", ""), numbers, None).grid(5) == [
        {"a": 0, "b": 10}, {"a": 1, "b": 14}, {"a": 2, "b": 18}, {"a": 3, "b": 12}, {"a": 4, "b": 16},
    ]  # fmt: skip
    whole = Wording(("", "", ""), numbers, None).grid()
    assert len(whole) == 201
    for number in numbers:
        assert {row[number.name] for row in whole} >= {number.low, number.high}


def test_a_goals_key_knows_what_it_writes_anywhere_on_the_scale() -> None:
    class Late(OverallGoal):
        """Writes another text at the top alone, by what no argument tells."""

        top = 10.0

        def text(self, goal: float, attributes: Sequence[float] = ()) -> str:
            return super().text(goal) if goal < self.top else "Be perfect."

    before = Late().describe()
    Late.top = 10.01
    assert Late().describe() != before
    for low, high in ((1, 10), (-1, 1)):
        described = OverallGoal(RewardScale(low, high, 2)).describe()
        step = (high - low) / 200
        assert all(f"score: {RewardScale(low, high, 2).printed(low + step * i)}." in described for i in range(201))
        assert described.count("score: ") == 201
        assert "scales.RewardScale" in described
    several = SEVERAL.describe()
    assert repr(SEVERAL.text(0, (0, 0)))[1:-1] in several
    assert repr(SEVERAL.text(100, (100, 100)))[1:-1] in several


def test_the_text_floor_imports_no_torch() -> None:
    folder = ROOT / "src" / "rap_lightning" / "preferences"
    modules = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py")]
    names = [module.replace("/", ".").removesuffix("__init__").strip(".") for module in modules]
    assert len(names) > 15
    code = "import sys\n" + "\n".join(f"import rap_lightning.preferences.{name}".strip(".") for name in names)
    code += "\nassert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Fixed(GoalTemplate):
    """Writes the same for each goal, whatever that is."""

    def __init__(self, wording: Any = "Be good.") -> None:
        super().__init__()
        self.fixed = wording

    def text(self, goal: float, attributes: Any = ()) -> Any:
        return self.fixed


def test_a_template_that_tells_no_goals_apart_is_refused_with_its_text() -> None:
    with pytest.raises(ConfigError, match=r"Fixed states every goal alike, 'Be good\.'.*Print the number in its text"):
        ReadingOptions("rows.jsonl", goal=Fixed())
    with pytest.raises(ConfigError, match="with enough decimals"):
        OverallGoal(RewardScale(0.1, 0.3, decimals=0)).check_differ()
    for wording, message in ((None, "must return a string, and returned None for the goal 1"), (" ", "writes nothing")):
        with pytest.raises(ConfigError, match=message):
            ReadingOptions("rows.jsonl", goal=Fixed(wording))
    fitted = OverallGoal(QuantileScale(decimals=0))
    ReadingOptions("rows.jsonl", goal=fitted)  # asked once it is fitted
