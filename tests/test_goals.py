"""Goals read exactly as in the paper, and the scale refuses what makes no sense."""

import subprocess
import sys

import pytest

from conftest import ROOT
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import OverallGoal, RewardScale


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


def test_the_text_floor_imports_no_torch() -> None:
    folder = ROOT / "src" / "rap_lightning" / "preferences"
    modules = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py")]
    names = [module.replace("/", ".").removesuffix("__init__").strip(".") for module in modules]
    assert len(names) > 15
    code = "import sys\n" + "\n".join(f"import rap_lightning.preferences.{name}".strip(".") for name in names)
    code += "\nassert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
