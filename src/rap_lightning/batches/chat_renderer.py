"""Conversations as text: with the goal, by the chat template, and without injected control tokens.

Read :meth:`ChatRenderer.render_prompt` and :meth:`ChatRenderer.render_response` first. What a chat template was given
must be found in what it wrote: conversations that lose text are bad rows, and templates that lose all text are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.batches.control_tokens import CLOSE, LOOKALIKE, MARK, OPEN, OPEN_SYSTEM, ControlTokens
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import Placement
from rap_lightning.preferences.pairs import BadRow, Message
from rap_lightning.preferences.rendering import (
    lost_texts,
    render,
    render_short,
    resolve_placement,
    shows_system,
    template_texts,
    with_goal,
)
from rap_lightning.preferences.thoughts import Thinking, join_thoughts, split_thoughts, tags_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDED = "the chat template writes no end of turn after a response, the end-of-sequence token added"
AS_GENERATED = (
    "the chat template writes the prompt differently before a response, or cuts the response: written as generation "
    "would, after the generation prompt"
)
FORGOTTEN = "thoughts of earlier turns, which the chat template leaves out"
CLOSED = (
    "thoughts, where the chat template's prompt has closed the thinking block: thinking strip removes them, "
    "chat_template_kwargs {enable_thinking: true} may open it"
)
FIRST, SECOND, THIRD = "a-text-to-look-for", "a-response-to-look-for", "another-text-to-look-for"


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text up to the generation prompt, marks included; ``repaired`` says what was changed, in words."""

    text: str
    messages: list[Message]
    goal_text: str | None
    tools: Any
    repaired: list[str]

    @property
    def plain_text(self) -> str:
        return self.text.replace(MARK, "")


class ChatRenderer:
    """Renders conversations at a goal with a tokenizer's chat template.

    Attributes:
        placement: ``system`` or ``user``, as resolved for this chat template.
        system_shown: whether the template writes system messages.
        special: text and id of the control tokens.
        tags: what begins and ends thoughts; None where the template has no thinking.

    Raises:
        ConfigError: the template loses all text of a role, or doesn't tell the roles apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placement: Placement) -> None:
        self.tokenizer = tokenizer
        self.placement: Literal["system", "user"] = resolve_placement(tokenizer, placement)
        self.system_shown = shows_system(tokenizer)
        templates = template_texts(tokenizer)
        self.control = ControlTokens(tokenizer, templates, self._tried())
        self.special, self.special_pattern = self.control.ids, self.control.pattern
        self.tags = tags_of(templates, [token.content for token in tokenizer.added_tokens_decoder.values()])
        self._reads_reasoning = any("reasoning_content" in template for template in templates)

    def _tried(self) -> str:
        """Return a short conversation as the template writes it.

        Raises:
            ConfigError: the template loses what every conversation has.
        """
        turns = [("user", FIRST), ("assistant", SECOND), ("user", THIRD)]
        try:
            text = render_short(self.tokenizer, [{"role": r, "content": c} for r, c in turns])
        except ConfigError:
            raise
        except Exception as error:  # of the template's author
            raise ConfigError(
                f"the tokenizer's chat template fails on a short conversation: {type(error).__name__}: {error}"
            ) from error
        _, first, after_first = text.partition(FIRST)
        between, second, after_second = after_first.partition(SECOND)
        if not first or THIRD not in text:
            raise ConfigError(
                "the tokenizer's chat template does not write the text of user messages (perhaps it expects content in "
                "parts). Training would see empty prompts. Use a template that writes texts, or correct it."
            )
        places = [text.index(one) for one in (FIRST, SECOND, THIRD) if one in text]
        if places != sorted(places) or any(text.count(one) > 1 for one in (FIRST, SECOND, THIRD)):
            raise ConfigError(
                "the tokenizer's chat template writes the messages of a conversation in another order, or more than "
                "once. Correct it."
            )
        if second and between == after_second.partition(THIRD)[0]:
            raise ConfigError(
                "the tokenizer's chat template writes the same before a user's and an assistant's text, so that the "
                "roles of a conversation are lost. Use the template of an instruct model, or correct it."
            )
        return text

    def check_thinking(self, thinking: Thinking) -> None:
        """Raise ConfigError where empty thoughts are asked for and the template has no thinking."""
        if thinking == "empty" and self.tags is None:
            raise ConfigError(
                "thinking empty: this chat template writes and reads no thinking tags (such as <think>), so that none "
                "can be left empty. Use thinking strip."
            )

    def imitates(self, text: str) -> bool:
        return self.control.imitated_in(text)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def render_prompt(
        self, history: Sequence[Message], goal_text: str | None, tools: str | None = None
    ) -> RenderedPrompt:
        """The conversation up to and including the generation prompt, as text."""
        messages = with_goal(history, goal_text, self.placement, system_shown=self.system_shown)
        repaired = []
        safe, imitates = self.control.mark(messages, "prompt")
        tool_list, imitates_too = self.control.mark(json.loads(tools) if tools is not None else None, "tools")
        if imitates or imitates_too:
            repaired.append(LOOKALIKE)
        text = self._apply_template(safe, "prompt", generation_prompt=True, tools=tool_list)
        if self._check_written(safe, goal_text, tool_list, text):
            repaired.append(FORGOTTEN)
        return RenderedPrompt(text, safe, goal_text, tool_list, repaired)

    def _check_written(self, messages: Sequence[Message], goal_text: str | None, tools: Any, text: str) -> bool:
        """Return whether thoughts of earlier turns are left out, which templates of thinking models do on purpose.

        Raises:
            BadRow: the template has lost something else.
        """
        texts, thoughts, called = dict[str, list[str]](), list[str](), list[str]()
        for turn in messages:
            content = turn["content"]
            if turn["role"] == "assistant":
                thought, content = split_thoughts(content)
                thoughts += [one for one in (thought, turn.get("reasoning_content")) if one]
            texts.setdefault(turn["role"], []).append(content)
            called += _texts_of([call.get("function", call) for call in turn.get("tool_calls") or []])
        called += [tool.get("function", tool).get("name", "") for tool in tools or [] if isinstance(tool, dict)]
        found = [one for several in texts.values() for one in several]
        if lost := lost_texts(found, text):
            role = next(role for role, several in texts.items() if lost[0] in several)
            what = "the goal" if goal_text and goal_text in lost[0] else f"the text of a {role} message"
            raise BadRow("prompt", f"the chat template does not write {what}")
        if lost_texts(list(dict.fromkeys(called)), text):
            raise BadRow("chosen, rejected", "tools or tool calls that the chat template does not write")
        return bool(lost_texts(thoughts, text))

    # -- responses ----------------------------------------------------------------------------------------------------

    def render_response(self, prompt: RenderedPrompt, text: str, column: str) -> tuple[str, list[str]]:
        """The text of the prompt with a response, and what was changed in it.

        The template writes it, and where it would change the prompt or lose text of the response, the response follows
        the generation prompt as it would in generation.
        """
        safe, imitates = self.control.mark(text, column)
        repaired = [LOOKALIKE] if imitates else []
        thoughts, answer = split_thoughts(safe) if self.tags else (None, safe)
        for turn in self._turns_of(thoughts, answer, safe):
            whole = self._apply_template([*prompt.messages, turn], column, generation_prompt=False, tools=prompt.tools)
            tail = whole[len(prompt.text) :]
            if whole.startswith(prompt.text) and not lost_texts([thoughts or "", answer], tail):
                break
        else:
            whole = prompt.text + self._after_prompt(prompt.plain_text, thoughts, answer, column)
            repaired.append(AS_GENERATED)
        if not self.ends_turn(prompt, whole):
            if self.tokenizer.eos_token_id is None:
                raise BadRow(column, "neither the chat template nor the tokenizer has an end of turn")
            repaired.append(ENDED)
        return whole, repaired

    def _turns_of(self, thoughts: str | None, answer: str, text: str) -> Iterator[Message]:
        """Yield messages that hold the response, the best one first."""
        if thoughts is None or self.tags is None:
            yield {"role": "assistant", "content": text}
            return
        if self._reads_reasoning:
            inside = {"reasoning_content": thoughts.strip("\n")}
            yield {"role": "assistant", "content": answer.lstrip("\n"), **inside}
        yield {"role": "assistant", "content": f"{self.tags.open}{thoughts}{self.tags.close}{answer}"}

    def _after_prompt(self, prompt: str, thoughts: str | None, answer: str, column: str) -> str:
        """The response as generation would write it after the prompt, and the end of turn."""
        (lead, end), tags, before = self._around_response, self.tags, prompt.rstrip()
        if tags and before.endswith(tags.close):
            if thoughts is not None and thoughts.strip():
                raise BadRow(column, CLOSED)
            return answer.lstrip("\n") + end
        if tags and before.endswith(tags.open):
            block = join_thoughts(thoughts or "", answer.lstrip("\n"), tags).removeprefix(tags.open)
            return (block.removeprefix("\n") if prompt.endswith("\n") else block) + end
        if tags is None or thoughts is None:
            return lead + answer + end
        return f"{lead}{tags.open}{thoughts}{tags.close}{answer}{end}"

    @cached_property
    def _around_response(self) -> tuple[str, str]:
        """What the template writes between the generation prompt and a response without thoughts, and after it."""
        user = {"role": "user", "content": FIRST}
        prompt = render(self.tokenizer, [user], generation_prompt=True)
        head, found, end = render(self.tokenizer, [user, {"role": "assistant", "content": SECOND}]).partition(SECOND)
        if not found:
            raise ConfigError("the tokenizer's chat template does not write the text of an assistant's message.")
        lead = head[len(prompt) :] if head.startswith(prompt) else ""
        return ("" if self.tags and self.tags.close in lead else lead), end

    def ends_turn(self, prompt: RenderedPrompt, whole: str) -> bool:
        """Whether the template writes a control token after the prompt; those in the response's text are marked."""
        return self.special_pattern.search(whole, len(prompt.text)) is not None

    def _apply_template(
        self, messages: Sequence[Message], column: str, *, generation_prompt: bool, tools: Any = None
    ) -> str:
        try:
            text = render(self.tokenizer, messages, generation_prompt=generation_prompt, tools=tools)
        except Exception as error:  # templates refuse conversations with any exception that their author raised
            raise BadRow(column, f"the chat template refuses the conversation: {error}") from error
        if "\\ufdd0" in text:
            raise BadRow(column, "text that imitates a control token, where the chat template escapes it")
        return text

    # -- where turns are, for truncation ------------------------------------------------------------------------------

    def turns(self, prompt: RenderedPrompt, history: Sequence[Message]) -> list[tuple[int, int]]:
        """(start, end) of the data's own turns in the prompt's text without marks, in the order in which they are cut.

        The prompt is rendered once more with brackets around each turn, which are found in the text.
        """
        plain, text = prompt.plain_text, ""
        for strip in (False, True):  # a template that trims turns would not trim inside the brackets
            bracketed = []
            for turn in history:
                content = turn["content"].strip() if strip else turn["content"]
                if turn.get("tool_calls") and not content:
                    bracketed.append(turn)
                    continue
                opening = OPEN_SYSTEM if turn["role"] == "system" else OPEN
                # thoughts stay outside: a template of a thinking model looks for them, and leaves them out
                thoughts, answer = split_thoughts(content) if turn["role"] == "assistant" else (None, content)
                answer = answer if thoughts is None else answer.lstrip()
                lead = content.removesuffix(answer)
                bracketed.append({**turn, "content": lead + opening + answer + CLOSE})
            messages = with_goal(bracketed, prompt.goal_text, self.placement, system_shown=self.system_shown)
            text = self._apply_template(messages, "prompt", generation_prompt=True, tools=prompt.tools)
            text = text.replace(MARK, "")
            if re.sub(f"[{OPEN}{OPEN_SYSTEM}{CLOSE}]", "", text) == plain:
                break
        else:
            raise BadRow("prompt", "too long, and the chat template rewrites its turns, so that none can be cut")
        found: list[tuple[bool, int, int]] = []
        position = start = 0
        is_system = False
        for character in text:
            if character in (OPEN, OPEN_SYSTEM):
                start, is_system = position, character == OPEN_SYSTEM
            elif character == CLOSE:
                found.append((is_system, start, position))
            else:
                position += 1
        return [(start, end) for _, start, end in sorted(found)]  # other turns before system text, oldest first


def _texts_of(value: Any) -> list[str]:
    """Return the texts in a nested value, without the names of fields."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts_of(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts_of(item)]
    return [value] if isinstance(value, str) else []
