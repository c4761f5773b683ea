"""Conversations as text: with the goal, by the chat template, and without injected control tokens.

Text from the data must never become a control token. A mark is inserted into whatever reads like one, which breaks it;
encode.py tokenises marked text piece by piece, and removes the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.preferences.goals import Placement
from rap_lightning.preferences.pairs import BadRow, Message
from rap_lightning.preferences.rendering import render, resolve_placement, shows_system, with_goal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters, never part of real text:
MARK = chr(0xFDD0)  # inserted into rendered text to break what imitates a control token
OPEN, OPEN_SYSTEM, CLOSE = chr(0xFDD1), chr(0xFDD2), chr(0xFDD3)  # put around turns to find them in rendered text
RESERVED = re.compile(f"[{MARK}{OPEN}{OPEN_SYSTEM}{CLOSE}]")

LOOKALIKE = "text that imitates a control token, kept as text"
ENDED = "the chat template writes no end of turn after a response, the end-of-sequence token added"


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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placement: Placement) -> None:
        self.tokenizer = tokenizer
        self.placement: Literal["system", "user"] = resolve_placement(tokenizer, placement)
        self.system_shown = shows_system(tokenizer)
        self.special = self._control_tokens()
        ordered = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, ordered)) + ")" if ordered else "(?!)")

    def _control_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that text must never become: special tokens, and those that the template writes.

        Some tokenizers do not declare their role markers special; rendering a short conversation shows them.
        """
        turns = [("user", "a"), ("assistant", "b"), ("user", "a")]
        probe = render(self.tokenizer, [{"role": r, "content": c} for r, c in turns], generation_prompt=True)
        added = self.tokenizer.added_tokens_decoder.items()
        return {t.content: i for i, t in added if len(t.content) > 1 and (t.special or t.content in probe)}

    def imitates(self, text: str) -> bool:
        return self.special_pattern.search(text) is not None

    def render_prompt(
        self, history: Sequence[Message], goal_text: str | None, tools: str | None = None
    ) -> RenderedPrompt:
        """The conversation up to and including the generation prompt, as text."""
        messages = with_goal(history, goal_text, self.placement, system_shown=self.system_shown)
        safe, repaired = self._mark_lookalikes(messages, "prompt")
        tool_list = json.loads(tools) if tools is not None else None
        text = self._apply_template(safe, "prompt", generation_prompt=True, tools=tool_list)
        self._check_tools(history, tool_list, text)
        return RenderedPrompt(text, safe, goal_text, tool_list, repaired)

    def render_response(self, prompt: RenderedPrompt, text: str, column: str) -> tuple[str, list[str]]:
        """The text of the prompt with a response, and what was changed in it."""
        answer, repaired = self._mark_lookalikes([{"role": "assistant", "content": text}], column)
        whole = self._apply_template(prompt.messages + answer, column, generation_prompt=False, tools=prompt.tools)
        if not whole.startswith(prompt.text):
            raise BadRow(column, "the chat template does not write the prompt as a prefix of prompt and response")
        if not self.ends_turn(prompt, whole):
            if self.tokenizer.eos_token_id is None:
                raise BadRow(column, "neither the chat template nor the tokenizer has an end of turn")
            repaired = [*repaired, ENDED]
        return whole, repaired

    def ends_turn(self, prompt: RenderedPrompt, whole: str) -> bool:
        """Whether the template writes a control token after the prompt; those in the response's text are marked."""
        return self.special_pattern.search(whole, len(prompt.text)) is not None

    def _apply_template(
        self, messages: Sequence[Message], column: str, *, generation_prompt: bool, tools: Any = None
    ) -> str:
        try:
            return render(self.tokenizer, messages, generation_prompt=generation_prompt, tools=tools)
        except Exception as error:  # templates refuse conversations with any exception that their author raised
            raise BadRow(column, f"the chat template refuses the conversation: {error}") from error

    def _check_tools(self, history: Sequence[Message], tools: Any, text: str) -> None:
        """Raise BadRow where the template leaves out a tool, a call or what it returned."""
        wanted = [tool.get("function", tool).get("name", "") for tool in tools or [] if isinstance(tool, dict)]
        for turn in history:
            wanted += [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or []]
            if turn["role"] == "tool":
                wanted.append(turn["content"].strip())
        if any(self._marked(part)[0] not in text for part in wanted):
            raise BadRow("chosen, rejected", "tools or tool calls that the chat template does not write")

    def _mark_lookalikes(self, messages: Sequence[Message], column: str) -> tuple[list[Message], list[str]]:
        """The messages with a mark inside every text of a control token, and what was changed."""
        safe, repaired = [], []
        for turn in messages:
            if turn.get("tool_calls") and self.imitates(json.dumps(turn["tool_calls"], ensure_ascii=False)):
                raise BadRow(column, "a tool call with text that imitates a control token")
            if found := RESERVED.search(turn["content"]):
                raise BadRow(column, f"text holds the Unicode noncharacter U+{ord(found[0]):04X}")
            content, count = self._marked(turn["content"])
            if count:
                repaired.append(LOOKALIKE)
            safe.append({**turn, "content": content})
        return safe, repaired

    def _marked(self, text: str) -> tuple[str, int]:
        return self.special_pattern.subn(lambda m: m[0][0] + MARK + m[0][1:], text)

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
                bracketed.append({**turn, "content": opening + content + CLOSE})
            messages = with_goal(bracketed, prompt.goal_text, self.placement, system_shown=self.system_shown)
            text = self._apply_template(messages, "prompt", generation_prompt=True, tools=prompt.tools)
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
