"""Conversations to token ids.

How :meth:`Encoder.encode` works, in order:

1. Prompts and responses are rendered as text (chat_renderer.py).
2. ``_tokenize`` encodes the texts of all conversations in one call of the tokenizer.
3. ``_response_ids`` takes the ids that follow the prompt's.
4. ``truncate`` fits prompts and responses into ``max_length``. No other code cuts tokens.

For every conversation that is encoded:

- the prompt's ids are an exact prefix of prompt + response: where tokens would merge across the end of the prompt, they
  are split there and counted (law 4);
- the response is everything that the chat template writes after the generation prompt: the text, the end of turn, and
  the separator that some templates write after it;
- text from the data never becomes a control token: text that looks like one is encoded as text and counted;
- the goal and the template's own tokens are never cut; other prompt text is cut where it must be, and counted (law 3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rap_lightning.batches import chat_renderer, control_tokens
from rap_lightning.batches.chat_renderer import ChatRenderer, RenderedPrompt
from rap_lightning.batches.control_tokens import MARK
from rap_lightning.errors import ConfigError
from rap_lightning.preferences import rendering, thoughts
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import BadRow, Message, carried

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDARY = "tokens would merge across the end of the prompt, split there"


@dataclass(frozen=True)
class Conversation:
    """What is encoded together: one history under some goals, and any number of responses to it (two in a pair).

    Attributes:
        history: the turns before the response.
        goal_texts: a prompt is encoded for each; ``None`` is the plain prompt, without a goal.
        responses: their texts.
        columns: the data's column of each response, for errors; by default ``response``.
        tools: the tools the conversation may call, as JSON, where the history doesn't carry them.
    """

    history: Sequence[Message]
    goal_texts: Sequence[str | None] = (None,)
    responses: Sequence[str] = ()
    columns: Sequence[str] = ()
    tools: str | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a :class:`Conversation`, how many were cut, and what was changed, in words."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    cut_prompts: list[int]
    cut_responses: list[int]
    repaired: list[str]

    def notes(self) -> list[str]:
        cuts = [("prompts", self.cut_prompts), ("ends of responses", self.cut_responses)]
        return [f"repaired: {what}" for what in self.repaired] + [
            f"cut: {what} that didn't fit" for what, numbers in cuts if any(numbers)
        ]


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text: its prompts, and the text of the first prompt with each response."""

    conversation: Conversation
    prompts: list[RenderedPrompt]
    sequences: list[str]
    repaired: list[str]

    def texts(self) -> list[str]:
        return [*(prompt.text for prompt in self.prompts), *self.sequences]


class Encoder(ChatRenderer):
    """Renders and tokenises conversations at a goal.

    Args:
        tokenizer: has a chat template and a fast (Rust) backend.
        goal: the template, or ``None`` for plain conversations.
        max_length: tokens of prompt and response together.
        max_prompt_length: a prompt is cut only where prompt and longer response exceed ``max_length``, and never below
            this many tokens; by default half of ``max_length``.

    Raises:
        ConfigError: no chat template, a slow tokenizer, or lengths that leave no room.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        goal: GoalTemplate | None,
        max_length: int,
        max_prompt_length: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):  # the attribute is missing from some tokenizers of other libraries
            raise ConfigError(
                f"{type(tokenizer).__name__} has no fast (Rust) backend, which is needed to know the position of each "
                "token in the text. Save the tokenizer in the tokenizer.json format."
            )
        super().__init__(tokenizer, goal.placement if goal else "auto")
        self.goal, self.max_length = goal, max_length
        self.max_prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        if not 1 <= self.max_prompt_length < max_length:
            raise ConfigError(
                f"max_prompt_length must be from 1 to max_length - 1 = {max_length - 1}, found "
                f"{self.max_prompt_length}. Set --data.max_prompt_length, or raise --data.max_length {max_length} "
                "(without data. in commands other than fit and plan); a config may have set either."
            )

    @property
    def pad_id(self) -> int:
        """The id to pad with; padding is masked, so any id would do."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    def key(self) -> str:
        """Digest of everything that changes the ids: a change to this code makes cached ids invalid, too."""
        parts = {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            "template": self.tokenizer.chat_template,
            "code": _source_digest(),
            "goal": self.goal.describe() if self.goal else None,
            "lengths": [self.max_length, self.max_prompt_length],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedConversation | BadRow]:
        """Token ids of each conversation, or why it can't be encoded."""
        rendered: list[_Rendered | BadRow] = []
        for conversation in conversations:
            try:
                rendered.append(self._render(conversation))
            except BadRow as problem:
                rendered.append(problem)
        ids = self._tokenize([text for one in rendered if isinstance(one, _Rendered) for text in one.texts()])
        found: list[EncodedConversation | BadRow] = []
        for one in rendered:
            try:
                found.append(self._encoded(one, ids) if isinstance(one, _Rendered) else one)
            except BadRow as problem:
                found.append(problem)
        return found

    def encode_one(self, conversation: Conversation) -> EncodedConversation:
        """Token ids of one conversation."""
        (found,) = self.encode([conversation])
        if isinstance(found, BadRow):
            raise found
        return found

    def prompt_ids(self, history: Sequence[Message], goal_text: str | None) -> list[int]:
        """The ids of an uncut prompt."""
        text = self.render_prompt(history, goal_text).text
        return self._tokenize([text])[text]

    def readable(self, ids: Sequence[int]) -> str:
        """The text of token ids, with brackets around control tokens and thinking tags: ⟦<|im_end|>⟧."""
        shown = set(self.special.values()) | set(self.tokenizer.convert_tokens_to_ids(list(self.tags or ())))
        parts = []
        for is_token, run in groupby(ids, lambda one: one in shown):
            own = list(run)
            parts += [f"⟦{self.tokenizer.decode(i)}⟧" for i in own] if is_token else [self.tokenizer.decode(own)]
        return "".join(parts)

    def _render(self, conversation: Conversation) -> _Rendered:
        history, tools = carried(conversation.history)
        conversation = replace(conversation, history=history, tools=conversation.tools or tools)
        prompts = [self.render_prompt(conversation.history, t, conversation.tools) for t in conversation.goal_texts]
        repaired = [what for prompt in prompts for what in prompt.repaired]
        columns = conversation.columns or ("response",) * len(conversation.responses)
        sequences = []
        for text, column in zip(conversation.responses, columns, strict=True):
            sequence, more = self.render_response(prompts[0], text, column)
            sequences.append(sequence)
            repaired += more
        return _Rendered(conversation, prompts, sequences, repaired)

    def _tokenize(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The ids of each text. One call for all texts is several times faster than a call for each."""
        plain = list(dict.fromkeys(text for text in texts if MARK not in text))
        # an empty list of texts is an error in transformers
        encoded = self.tokenizer(plain, add_special_tokens=False, return_attention_mask=False) if plain else None
        ids = dict(zip(plain, encoded["input_ids"], strict=True)) if encoded else {}
        return {text: ids[text] if text in ids else [i for i, _, _ in self._spans(text)] for text in texts}

    def _encoded(self, rendered: _Rendered, ids: Mapping[str, list[int]]) -> EncodedConversation:
        first = rendered.prompts[0]
        repaired = list(rendered.repaired)
        responses = []
        for sequence in rendered.sequences:
            response, merged = self._response_ids(first, sequence, ids)
            responses.append(response)
            repaired += [BOUNDARY] if merged else []
        history, prompts = rendered.conversation.history, [ids[prompt.text] for prompt in rendered.prompts]
        kept_prompts, kept_responses = self.truncate(history, rendered.prompts, prompts, responses)
        return EncodedConversation(
            kept_prompts,
            kept_responses,
            [len(a) - len(b) for a, b in zip(prompts, kept_prompts, strict=True)],
            [len(a) - len(b) for a, b in zip(responses, kept_responses, strict=True)],
            sorted(set(repaired)),
        )

    def _response_ids(
        self, prompt: RenderedPrompt, sequence: str, ids: Mapping[str, list[int]]
    ) -> tuple[list[int], bool]:
        """What follows the prompt's ids, and whether tokens would have merged across the end of the prompt."""
        whole, before = ids[sequence], ids[prompt.text]
        merged = whole[: len(before)] != before
        tail = sequence[len(prompt.text) :]
        found = self._tokenize([tail])[tail] if merged else whole[len(before) :]
        return (found if self.ends_turn(prompt, sequence) else [*found, self.tokenizer.eos_token_id]), merged

    def _spans(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of each token in ``text`` without marks; marked text is encoded as text.

        A fast tokenizer splits text at control tokens before anything else. So the text between them, and on either
        side of a mark, is encoded piece by piece. Each piece is encoded right after a control token, as in the whole
        text: some tokenizers put a blank before text that nothing precedes.
        """
        base, anchor = 0, ""
        for piece in self.special_pattern.split(text) if MARK in text else [text]:
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

    # -- truncation ---------------------------------------------------------------------------------------------------

    def truncate(
        self,
        history: Sequence[Message],
        prompts: Sequence[RenderedPrompt],
        prompt_ids: Sequence[list[int]],
        response_ids: Sequence[list[int]],
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of prompts and responses, cut so that every prompt with every response fits ``max_length``.

        A prompt is cut only where it and the longest response exceed ``max_length``, and never below
        ``max_prompt_length``; with no response to come, it is cut to ``max_prompt_length``. Then the ends of responses
        are cut, to what the longest prompt leaves: under all goals alike, so that the same tokens are compared.

        Raises:
            BadRow: the goal and the template's own tokens alone leave no room for a response.
        """
        longest = max(map(len, response_ids), default=self.max_length)
        budget = max(self.max_prompt_length, self.max_length - longest)
        kept = [
            ids if len(ids) <= budget else self._cut(prompt, history, budget)
            for prompt, ids in zip(prompts, prompt_ids, strict=True)
        ]
        room = self.max_length - max(map(len, kept))
        return kept, [ids[:room] for ids in response_ids]

    def _cut(self, prompt: RenderedPrompt, history: Sequence[Message], budget: int) -> list[int]:
        """The prompt's ids without conversation text, until ``budget`` remain.

        The oldest turns are cut first; of a turn that is cut in part, the middle is cut, since instructions are usually
        at either end. The data's own system message is cut last. The goal and the template's own tokens stay.
        """
        tokens = list(self._spans(prompt.text))
        excess = len(tokens) - budget
        removed: set[int] = set()
        for start, end in self.turns(prompt, history):
            inside = [i for i, (_, s, e) in enumerate(tokens) if start <= s < e <= end]
            count = min(excess - len(removed), len(inside))
            first = (len(inside) - count) // 2
            removed.update(inside[first : first + count])
        kept = [token for i, (token, _, _) in enumerate(tokens) if i not in removed]
        if len(kept) >= self.max_length:
            raise BadRow("prompt", f"the goal and the template alone leave no room within max_length={self.max_length}")
        return kept


@cache
def _source_digest() -> str:
    """Digest of the files that decide which ids a conversation has."""
    files = (__file__, chat_renderer.__file__, control_tokens.__file__, rendering.__file__, thoughts.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
