"""Conversations to token ids.

What holds for every pair this module lets through:
- the prompt's ids are an exact prefix of prompt + response, because the two are tokenised so that they meet at a token
  boundary (law 4);
- the response is everything that the chat template writes after the generation prompt: the text, the end of turn, and
  the separator some templates put behind it;
- text from the data never becomes a control token: what looks like one is tokenised as text and counted;
- the goal and the template's own tokens are never cut; prompt text is cut where it must be, and counted (law 3).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import BadRow, Message
from rap_lightning.preferences.rendering import render, resolve_placement, shows_system, with_goal

# Unicode noncharacters, never part of real text:
MARK = chr(0xFDD0)  # put inside rendered text to break what imitates a control token
OPEN, OPEN_SYSTEM, CLOSE = chr(0xFDD1), chr(0xFDD2), chr(0xFDD3)  # put around turns to find them in rendered text
RESERVED = re.compile(f"[{MARK}{OPEN}{OPEN_SYSTEM}{CLOSE}]")

LOOKALIKE = "text that imitates a control token, kept as text"
BOUNDARY = "tokens would merge across the end of the prompt, split there"
ENDED = "the chat template writes no end of turn after a response, the end-of-sequence token added"


@dataclass
class Notes:
    """What was done to one conversation, in words."""

    repaired: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids, the rendered text and turns they stand for, its goal, and how many tokens were cut."""

    ids: list[int]
    text: str
    messages: list[Message]
    goal_text: str | None = None
    cut: int = 0
    tools: Any = None


class Encoder:
    """Renders and tokenises conversations at a goal.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template and a fast (Rust) backend.
        goal: the template, or ``None`` for plain conversations.
        max_length: tokens of prompt and response together.
        max_prompt_length: a prompt is cut only where prompt and longer response exceed ``max_length``, and never below
            this many tokens.

    Raises:
        ConfigError: no chat template, a slow tokenizer, or lengths that leave no room.
    """

    def __init__(
        self, tokenizer: Any, goal: GoalTemplate | None, max_length: int, max_prompt_length: int | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} has no fast (Rust) backend, which is needed to know where each token "
                "stands in the text. Save the tokenizer in the tokenizer.json format."
            )
        self.tokenizer, self.goal = tokenizer, goal
        self.max_length = max_length
        self.max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        if not 1 <= self.max_prompt_length < max_length:
            raise ConfigError(
                f"max_prompt_length must be from 1 to max_length - 1 = {max_length - 1}, found "
                f"{self.max_prompt_length}. Set --data.max_prompt_length, or raise --data.max_length {max_length} "
                "(without data. in commands other than fit and plan); a config may have set either."
            )
        self.placement = resolve_placement(tokenizer, goal.placement if goal else "auto")
        self.system_shown = shows_system(tokenizer)
        self.special = self._control_tokens()
        ordered = sorted(self.special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, ordered)) + ")" if ordered else "(?!)")

    def _control_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that text must never become: special ones, and those that the template writes.

        Some tokenizers do not declare their role markers special; a conversation rendered as a probe shows them.
        """
        turns = [("user", "a"), ("assistant", "b"), ("user", "a")]
        probe = render(self.tokenizer, [{"role": r, "content": c} for r, c in turns], generation_prompt=True)
        added = self.tokenizer.added_tokens_decoder.items()
        return {t.content: i for i, t in added if len(t.content) > 1 and (t.special or t.content in probe)}

    def imitates(self, text: str) -> bool:
        """Whether text from the data reads like a control token somewhere."""
        return self._special_pattern.search(text) is not None

    def split_at_control_tokens(self, text: str) -> list[str]:
        """Rendered text in pieces: control tokens, and what stands between them."""
        return self._special_pattern.split(text)

    def key(self) -> str:
        """Digest of everything that changes the ids."""
        parts = {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            "template": self.tokenizer.chat_template,
            "package": __version__,
            "goal": self.goal.describe() if self.goal else None,
            "lengths": [self.max_length, self.max_prompt_length],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def prompt(
        self, history: Sequence[Message], goal_text: str | None, notes: Notes, tools: str | None = None
    ) -> EncodedPrompt:
        """The conversation up to and including the generation prompt.

        Args:
            history: the turns before the response.
            goal_text: what the goal template says; ``None`` for a plain conversation.
            notes: gets what was repaired.
            tools: the tools the conversation may call, as JSON.

        Raises:
            BadRow: the chat template refuses the conversation, or leaves tools out of it.
        """
        messages = with_goal(history, goal_text, self.placement, system_shown=self.system_shown)
        safe = self._safe(messages, notes, "prompt")
        tool_list = json.loads(tools) if tools is not None else None
        text = self._render(safe, "prompt", generation_prompt=True, tools=tool_list)
        self._check_tools(history, tool_list, text)
        return EncodedPrompt(self._ids(text), text, safe, goal_text, tools=tool_list)

    def fit(self, prompt: EncodedPrompt, history: Sequence[Message], room_for: int) -> EncodedPrompt:
        """The prompt, cut where it must be so that ``room_for`` response tokens follow within ``max_length``.

        It keeps at least ``max_prompt_length`` tokens, and always the goal and the template's own.

        Raises:
            BadRow: the goal and the template's own tokens alone leave no room for a response.
        """
        budget = max(self.max_prompt_length, self.max_length - room_for)
        if len(prompt.ids) <= budget:
            return prompt
        kept = self._cut(prompt, history, budget)
        return replace(prompt, ids=kept, cut=len(prompt.ids) - len(kept))

    def response(self, prompt: EncodedPrompt, text: str, notes: Notes, column: str = "chosen") -> list[int]:
        """The ids that the template writes after an uncut ``prompt`` for a response.

        Raises:
            BadRow: the template does not write the prompt as a prefix of prompt and response.
        """
        answer = self._safe([{"role": "assistant", "content": text}], notes, column)
        whole_text = self._render(prompt.messages + answer, column, generation_prompt=False, tools=prompt.tools)
        if not whole_text.startswith(prompt.text):
            raise BadRow(column, "the chat template does not write the prompt as a prefix of prompt and response")
        tail = whole_text[len(prompt.text) :]
        whole = self._ids(whole_text)
        if whole[: len(prompt.ids)] == prompt.ids:
            ids = whole[len(prompt.ids) :]
        else:
            notes.repaired.append(BOUNDARY)
            ids = self._ids(tail)
        # a control token in the tail is the template's own: those in the text carry a mark
        if not self._special_pattern.search(tail):
            if self.tokenizer.eos_token_id is None:
                raise BadRow(column, "neither the chat template nor the tokenizer has an end of turn")
            notes.repaired.append(ENDED)
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids

    # -- text -----------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], column: str, *, generation_prompt: bool, tools: Any = None) -> str:
        try:
            return render(self.tokenizer, messages, generation_prompt=generation_prompt, tools=tools)
        except Exception as error:  # templates refuse conversations with whatever jinja error their author raised
            raise BadRow(column, f"the chat template refuses the conversation: {error}") from error

    def _check_tools(self, history: Sequence[Message], tools: Any, text: str) -> None:
        """Raise BadRow where the template leaves out a tool, a call or what it returned."""
        wanted = [tool.get("function", tool).get("name", "") for tool in tools or [] if isinstance(tool, dict)]
        for turn in history:
            wanted += [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or []]
            if turn["role"] == "tool":
                wanted.append(turn["content"].strip())
        if any(self._special_pattern.sub(lambda m: m[0][0] + MARK + m[0][1:], part) not in text for part in wanted):
            raise BadRow("chosen, rejected", "tools or tool calls that the chat template does not write")

    def _safe(self, messages: Sequence[Message], notes: Notes, column: str) -> list[Message]:
        """The messages with a mark inside whatever reads like a control token."""
        safe = []
        for turn in messages:
            if turn.get("tool_calls") and self._special_pattern.search(
                json.dumps(turn["tool_calls"], ensure_ascii=False)
            ):
                raise BadRow(column, "a tool call with text that imitates a control token")
            if found := RESERVED.search(turn["content"]):
                raise BadRow(column, f"text holds the Unicode noncharacter U+{ord(found[0]):04X}")
            content, count = self._special_pattern.subn(lambda m: m[0][0] + MARK + m[0][1:], turn["content"])
            if count:
                notes.repaired.append(LOOKALIKE)
            safe.append({**turn, "content": content})
        return safe

    # -- ids ------------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        if MARK not in text:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [token for token, _, _ in self._spans(text)]

    def _spans(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token in ``text`` without marks; marked text is tokenised as text.

        Control tokens are hard boundaries for a fast tokenizer. So text is tokenised between them, and on either side
        of a mark, each piece right after a control token, as it stands in the whole: some tokenizers put a blank before
        text that nothing precedes.
        """
        base, anchor = 0, ""
        for piece in self._special_pattern.split(text) if MARK in text else [text]:
            if piece in self.special:
                yield self.special[piece], base, base + len(piece)
                base, anchor = base + len(piece), piece
                continue
            for part in filter(None, piece.split(MARK)):
                encoded = self.tokenizer(anchor + part, add_special_tokens=False, return_offsets_mapping=True)
                spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
                shift = base - len(anchor)
                for token, (start, end) in spans[1:] if anchor else spans:
                    yield token, shift + start, shift + end
                base, anchor = base + len(part), anchor or next(iter(self.special), "")

    def _cut(self, prompt: EncodedPrompt, history: Sequence[Message], budget: int) -> list[int]:
        """The prompt's ids with conversation text taken out until ``budget`` remain.

        The oldest turns go first; of the turn that goes in part, the middle goes, since instructions stand at either
        end. The data's own system message goes last. The goal and the template's own tokens stay.
        """
        tokens = list(self._spans(prompt.text))
        excess = len(tokens) - budget
        removed: set[int] = set()
        for start, end in self._turns(prompt, history):
            inside = [i for i, (_, s, e) in enumerate(tokens) if start <= s < e <= end]
            count = min(excess - len(removed), len(inside))
            first = (len(inside) - count) // 2
            removed.update(inside[first : first + count])
        kept = [token for i, (token, _, _) in enumerate(tokens) if i not in removed]
        if len(kept) >= self.max_length:
            raise BadRow("prompt", f"the goal and the template alone leave no room within max_length={self.max_length}")
        return kept

    def _turns(self, prompt: EncodedPrompt, history: Sequence[Message]) -> list[tuple[int, int]]:
        """Where the data's own turns stand in the prompt's text without marks, in the order in which they may be cut.

        Raises:
            BadRow: the template rewrites what stands in a turn, so that it can't be found.
        """
        plain, text = prompt.text.replace(MARK, ""), ""
        for strip in (False, True):  # a template that trims would not trim within the brackets
            bracketed = []
            for turn in history:
                content = turn["content"].strip() if strip else turn["content"]
                if turn.get("tool_calls") and not content:
                    bracketed.append(turn)
                    continue
                opening = OPEN_SYSTEM if turn["role"] == "system" else OPEN
                bracketed.append({**turn, "content": opening + content + CLOSE})
            messages = with_goal(bracketed, prompt.goal_text, self.placement, system_shown=self.system_shown)
            text = self._render(messages, "prompt", generation_prompt=True, tools=prompt.tools)
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
