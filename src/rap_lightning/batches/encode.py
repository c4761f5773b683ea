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

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.chat import render, resolve_placement, shows_system, with_goal
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import BadRow, Message

MARK = chr(0xFDD0)  # a Unicode noncharacter, put inside rendered text to break what imitates a control token

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
                f"max_prompt_length must be from 1 to max_length - 1 = {max_length - 1}, found {self.max_prompt_length}"
            )
        self.placement = resolve_placement(tokenizer, goal.placement if goal else "auto")
        self.system_shown = shows_system(tokenizer)
        self.special = {
            t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special and len(t.content) > 1
        }
        ordered = sorted(self.special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, ordered)) + ")" if ordered else "(?!)")

    def key(self) -> str:
        """Digest of everything that changes the ids."""
        parts = {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "template": self.tokenizer.chat_template,
            "goal": self.goal.describe() if self.goal else None,
            "lengths": [self.max_length, self.max_prompt_length],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def prompt(self, history: Sequence[Message], reward: float | None, notes: Notes) -> EncodedPrompt:
        """The conversation up to and including the generation prompt, asking for ``reward`` (``None``: no goal).

        Raises:
            BadRow: the chat template refuses the conversation.
        """
        goal_text = self.goal.text(reward) if self.goal is not None and reward is not None else None
        messages = with_goal(history, goal_text, self.placement, system_shown=self.system_shown)
        safe = self._safe(messages, notes)
        text = self._render(safe, generation_prompt=True)
        return EncodedPrompt(self._ids(text), text, safe, goal_text)

    def fit(self, prompt: EncodedPrompt, history: Sequence[Message], room_for: int) -> EncodedPrompt:
        """The prompt, cut where it must be so that ``room_for`` response tokens follow within ``max_length``.

        It keeps at least ``max_prompt_length`` tokens, and always the goal and the template's own.

        Raises:
            BadRow: the goal and the template's own tokens alone leave no room for a response.
        """
        budget = max(self.max_prompt_length, self.max_length - room_for)
        if len(prompt.ids) <= budget:
            return prompt
        kept = self._cut(prompt.text, history, prompt.goal_text, budget)
        return replace(prompt, ids=kept, cut=len(prompt.ids) - len(kept))

    def response(self, prompt: EncodedPrompt, text: str, notes: Notes) -> list[int]:
        """The ids that the template writes after an uncut ``prompt`` for a response.

        Raises:
            BadRow: the template does not write the prompt as a prefix of prompt and response.
        """
        answer = self._safe([{"role": "assistant", "content": text}], notes)
        whole_text = self._render(prompt.messages + answer, generation_prompt=False)
        if not whole_text.startswith(prompt.text):
            raise BadRow("chosen", "the chat template does not write the prompt as a prefix of prompt and response")
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
                raise BadRow("chosen", "neither the chat template nor the tokenizer has an end of turn")
            notes.repaired.append(ENDED)
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids

    # -- text -----------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        try:
            return render(self.tokenizer, messages, generation_prompt=generation_prompt)
        except Exception as error:  # templates refuse conversations with whatever jinja error their author raised
            raise BadRow("chosen", f"the chat template refuses the conversation: {error}") from error

    def _safe(self, messages: Sequence[Message], notes: Notes) -> list[Message]:
        """The messages with a mark inside whatever reads like a control token."""
        safe = []
        for turn in messages:
            if MARK in turn["content"]:
                raise BadRow("chosen", f"text holds the Unicode noncharacter U+{ord(MARK):04X}")
            content, found = self._special_pattern.subn(lambda m: m[0][0] + MARK + m[0][1:], turn["content"])
            if found:
                notes.repaired.append(LOOKALIKE)
            safe.append({**turn, "content": content})
        return safe

    # -- ids ------------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        if MARK not in text:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [token for token, _, _ in self._spans(text)]

    def _spans(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token in ``text`` without marks; marked text is tokenised as text."""
        base = 0
        pieces = self._special_pattern.split(text) if MARK in text else [text]
        for piece in pieces:
            plain = piece.replace(MARK, "")
            # control tokens are hard boundaries for fast tokenizers, so pieces between them stand for themselves
            options = {"split_special_tokens": True} if MARK in piece else {}
            encoded = self.tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, **options)
            for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                yield token, base + start, base + end
            base += len(plain)

    def _cut(self, text: str, history: Sequence[Message], goal_text: str | None, budget: int) -> list[int]:
        """The prompt's ids with conversation text taken out until ``budget`` remain.

        The oldest turns go first; of the turn that goes in part, the middle goes, since instructions stand at either
        end. The data's own system message goes last. The goal and the template's own tokens stay.
        """
        tokens = list(self._spans(text))
        excess = len(tokens) - budget
        plain = text.replace(MARK, "")
        cuttable: list[list[int]] = []
        cursor = plain.find(goal_text) + len(goal_text) if goal_text and goal_text in plain else 0
        turns = sorted(history, key=lambda turn: turn["role"] != "system")  # as rendered: system text first
        spans = []
        for turn in turns:
            content = turn["content"].strip()
            start = plain.find(content, cursor)
            if content and start >= 0:
                cursor = start + len(content)
                spans.append((turn["role"] == "system", start, cursor))
        for _, start, end in sorted(spans, key=lambda span: span[0]):  # stable: oldest first, system last
            cuttable.append([i for i, (_, s, e) in enumerate(tokens) if start <= s < e <= end])
        removed: set[int] = set()
        for inside in cuttable:
            count = min(excess - len(removed), len(inside))
            first = (len(inside) - count) // 2
            removed.update(inside[first : first + count])
        kept = [token for i, (token, _, _) in enumerate(tokens) if i not in removed]
        if len(kept) >= self.max_length:
            raise BadRow("prompt", f"the goal and the template alone leave no room within max_length={self.max_length}")
        return kept
