"""Write the goal into a conversation, and render conversations with a chat template."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import Placement
from rap_lightning.preferences.pairs import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"  # between the goal and what follows it in the same turn
SHORT_S, SHORT_CHARACTERS = 30, 1_000_000
"""What a short conversation may take to render: it takes a millisecond, and is a thousand characters long."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """Return the conversation as the tokenizer's chat template writes it."""
    options = {} if tools is None else {"tools": tools}
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=generation_prompt, **options
    )
    return str(text)


def render_short(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Render a short conversation up to the generation prompt, as :func:`render`, with a limit of time and size.

    Raises:
        ConfigError: the template takes longer, as one whose loops don't end, or writes more.
    """
    done: list[str | Exception] = []

    def call() -> None:
        try:
            done.append(render(tokenizer, messages, generation_prompt=True))
        except Exception as error:  # of the template's author
            done.append(error)

    thread = threading.Thread(target=call, daemon=True)  # Jinja can't be interrupted: it is left behind
    thread.start()
    thread.join(SHORT_S)
    if not done or (isinstance(done[0], str) and len(done[0]) > SHORT_CHARACTERS):
        fault = f"writes {len(done[0]):,} characters" if done else f"has not ended after {SHORT_S} s"  # type: ignore[arg-type]
        raise ConfigError(f"the tokenizer's chat template {fault} for a short conversation. Correct its loops.")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokenizer's chat templates: one, or several with names."""
    found = tokenizer.chat_template
    return [] if not found else list(found.values()) if isinstance(found, dict) else [found]


def lost_texts(texts: Sequence[str], written: str) -> list[str]:
    """Return those of the texts that a chat template has not written, each in a place of its own.

    Whitespace doesn't count, which templates strip, and a text may be escaped as in JSON.
    """
    lost = []
    rest, squeezed = written, ""
    for text in sorted(texts, key=len, reverse=True):  # or a short text would take its place within a longer one
        if not (own := text.strip()):
            continue
        if own in rest:
            rest = rest.replace(own, "\n", 1)
            continue
        squeezed = squeezed or _squeezed(written)
        escaped = json.dumps(own, ensure_ascii=False)[1:-1]
        if _squeezed(own) not in squeezed and _squeezed(escaped) not in squeezed:
            lost.append(text)
    return lost


def _squeezed(text: str) -> str:
    return "".join(text.split())


def shows_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes system messages; a short conversation is rendered to find out."""
    probe = "a-system-message-to-look-for"
    messages = [{"role": "system", "content": probe}, {"role": "user", "content": "hello"}]
    try:
        return probe in render_short(tokenizer, messages)
    except ConfigError:
        raise
    except Exception:  # templates refuse a role with any exception that their author raised
        return False


def resolve_placement(tokenizer: PreTrainedTokenizerBase, placement: Placement) -> Literal["system", "user"]:
    """Return where the goal is written with this tokenizer.

    Raises:
        ConfigError: the tokenizer has no chat template, or one without system messages for the placement ``system``.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, which prompts are rendered with. Use an instruct model's "
            "tokenizer, or put a chat_template.jinja into the model's folder."
        )
    system = shows_system(tokenizer)
    if placement == "system" and not system:
        raise ConfigError(
            "goal placement is 'system', but this tokenizer's chat template shows no system message. "
            "Use 'auto', or 'user' to write the goal before the first user turn."
        )
    if placement == "auto":
        return "system" if system else "user"
    return placement


def with_goal(
    history: Sequence[Message],
    goal_text: str | None,
    placement: Literal["system", "user"],
    *,
    system_shown: bool = True,
) -> list[Message]:
    """Return the turns with the goal written in; a system message of the data's own follows the goal.

    Args:
        history: an optional system turn, then user and assistant turns; not modified.
        goal_text: ``None`` leaves the turns as they are.
        placement: from :func:`resolve_placement`.
        system_shown: whether the template has a system role; without one, the data's own system text is also written
            before the first user turn, so that it isn't lost.
    """
    system = [turn["content"] for turn in history if turn["role"] == "system"]
    rest = [dict(turn) for turn in history if turn["role"] != "system"]
    lead = [goal_text] if goal_text is not None else []
    if placement == "system" and system_shown:
        top = SEPARATOR.join(lead + system)
        return [{"role": "system", "content": top}, *rest] if top else rest
    if system_shown and system:
        before, kept = lead, [{"role": "system", "content": SEPARATOR.join(system)}]
    else:
        before, kept = lead + system, []
    rest[0]["content"] = SEPARATOR.join([*before, rest[0]["content"]])
    return kept + rest
