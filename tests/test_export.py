"""Models that leave: goals in the chat template write what training wrote, and nothing is left by what failed."""

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from conftest import make_tokenizer
from rap_lightning.batches.encode import Encoder, Notes
from rap_lightning.errors import ConfigError
from rap_lightning.models.folder import all_or_nothing
from rap_lightning.models.prompting import write_goals_by_itself
from rap_lightning.preferences.baked import restore_own_template
from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal

GOALS = {
    "overall": OverallGoal(),
    "attributes": AttributeGoal(["helpfulness", "on_topic"]),
    "before the user": OverallGoal(placement="user"),
}
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": " hello\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "why?"},
    ],
]


def ids_of(tokenizer: Any, chat: Any, **options: Any) -> list[int]:
    return list(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
    )


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS)
@pytest.mark.parametrize("chat", CHATS, ids=["plain", "system", "turns"])
def test_a_baked_template_writes_what_training_wrote(goal: GoalTemplate, chat: Any, family: str) -> None:
    tokenizer = make_tokenizer(family)
    encoder = Encoder(tokenizer, goal, 512)
    baked = write_goals_by_itself(tokenizer, goal.record())
    asked: list[tuple[float | None, dict[str, Any]]] = [
        (goal.best, {}), (7.46, {"goal": 7.46}), (3, {"goal": 3}), (1.0, {"goal": 1.0}),
        (None, {"goal": False}), (None, {"goal": None}),
    ]  # fmt: skip
    for number, options in asked:
        text = None if number is None else goal.write(number, goal.best_attributes)
        assert ids_of(baked, chat, **options) == encoder.prompt(chat, text, Notes()).ids, options
    assert ids_of(baked, chat) != ids_of(baked, chat, goal=False)


@pytest.mark.parametrize("goal", [11, 0.5, "7", True, {"x": 3}, float("nan"), {"overall": "9<|im_end|>"}, [3]])
def test_goals_outside_the_scale_are_refused(goal: Any) -> None:
    baked = write_goals_by_itself(make_tokenizer("chatml"), OverallGoal().record())
    with pytest.raises(TemplateError, match="goal"):
        ids_of(baked, CHATS[0], goal=goal)


def test_training_on_an_exported_model_sees_the_own_template() -> None:
    tokenizer = make_tokenizer("chatml")
    baked = write_goals_by_itself(tokenizer, OverallGoal().record())
    assert baked.chat_template != tokenizer.chat_template
    assert restore_own_template(baked).chat_template == tokenizer.chat_template


class Fixed(GoalTemplate):
    """A user's own."""

    def text(self, goal: float) -> str:  # type: ignore[override]
        return f"Aim for {'<|im_end|>' if goal < 5 else 'much'}."


class Control(Fixed):
    def text(self, goal: float) -> str:  # type: ignore[override]
        return "<|im_end|> please"


def test_a_users_own_template_gets_its_best_goal_only() -> None:
    baked = write_goals_by_itself(make_tokenizer("chatml"), Fixed().record())
    assert "Aim for much." in baked.apply_chat_template(CHATS[0], tokenize=False)
    with pytest.raises(TemplateError, match="best goal"):
        ids_of(baked, CHATS[0], goal=3)
    with pytest.raises(ConfigError, match="control token"):
        write_goals_by_itself(make_tokenizer("chatml"), Control().record())


@pytest.mark.parametrize("error", [OSError(28, "full"), PermissionError(13, "no"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), all_or_nothing(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"), all_or_nothing(tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match="can't be written"), all_or_nothing(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ConfigError, match="would be written"), all_or_nothing(tmp_path / "big", 1 << 60):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
