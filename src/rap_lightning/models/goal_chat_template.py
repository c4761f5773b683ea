"""A chat template that writes goals, compared with what training wrote."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.chat_template import bake, restore_own_template
from rap_lightning.preferences.goal_spec import Wording
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Message
from rap_lightning.preferences.rendering import resolve_placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAVE = "Leave the chat template as it is: --goal_in_template false"

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Name a colour."}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Name a colour.\n"}],
    [
        {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another?"},
    ],
    [
        {"role": "system", "content": "  Be kind.\n\nBe brief."}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    ],
]  # fmt: skip


class _Placed(GoalTemplate):
    """Tells an encoder where a recorded goal is placed."""

    def __init__(self, placement: Any) -> None:
        super().__init__(placement=placement)

    def text(self, goal: float, attributes: Any = ()) -> str:
        raise AssertionError("recorded goals have their text")


def with_goals_in_template(tokenizer: PreTrainedTokenizerBase, goal: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return a copy of a trained policy's tokenizer whose chat template asks for the best goal of its record.

    Conversations with and without a system message, of one turn and of several, are rendered at several goals, and
    their ids compared with those that training makes of them.

    Raises:
        ConfigError: the template doesn't write what training wrote.
    """
    own = restore_own_template(copy.copy(tokenizer))
    encoder = Encoder(own, _Placed(goal["placement"]), max_length=1_000_000)
    wording = Wording.of(goal["wording"]) if goal.get("wording") else None
    words = [goal["best"], *(wording.parts if wording else ())]
    if any(encoder.imitates(text) for text in words):
        raise ConfigError(
            "the goal's text is a control token of this tokenizer. Training encoded it as text, which a chat template "
            f"can't. {LEAVE}"
        )
    baked = copy.copy(own)
    placement = resolve_placement(own, goal["placement"])
    templates = own.chat_template if isinstance(own.chat_template, dict) else {"": own.chat_template}
    written = {name: bake(text, goal, placement, system_shown=encoder.system_shown) for name, text in templates.items()}
    baked.chat_template = written if isinstance(own.chat_template, dict) else written[""]
    _compare(encoder, baked, goal["best"], wording)
    return baked


def _compare(encoder: Encoder, baked: PreTrainedTokenizerBase, best: str, wording: Wording | None) -> None:
    asked: list[tuple[str | None, dict[str, Any]]] = [(best, {}), (None, {"goal": False})]
    if wording is not None:
        for values in [*wording.grid(4), {wording.numbers[0].name: wording.numbers[0].low}]:
            asked.append((wording.text(values), {"goal": values}))
        if wording.alone is not None:
            low = next(number.low for number in wording.numbers if number.name == wording.alone)
            asked.append((wording.text({wording.alone: low}), {"goal": low}))
    for history in CONVERSATIONS:
        for text, options in asked:
            expected = encoder.prompt_ids(history, text)
            found = baked.apply_chat_template(history, add_generation_prompt=True, return_dict=True, **options)
            if list(found["input_ids"]) != expected:
                raise ConfigError(
                    "with the goal in it, this model's chat template writes something else than training did "
                    f"({options or 'the best goal'}): {baked.decode(found['input_ids'])!r}. {LEAVE}"
                )
