"""Token ids of many conversations at once: each text is tokenised once, whatever number of sequences it stands in.

A relabelled pair is four sequences of prompt and response in which every text stands at least twice. Control tokens are
hard boundaries for a fast tokenizer: what stands between two of them is tokenised on its own. So a conversation is
rendered once for all texts, as a skeleton with gaps, and its sequences are put together from the ids of the pieces
between control tokens. That gives the same ids as tokenising whole sequences where

- the chat template is proved to write texts as they are (rap_lightning.preferences.templates), and
- no control token swallows blanks before it.

Everything else (a template that can't be proved, text that imitates a control token, tools, tokens that merge across
the end of the prompt) is left to the Encoder, sequence by sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rap_lightning.batches.encode import RESERVED, Encoder
from rap_lightning.preferences.pairs import Message
from rap_lightning.preferences.rendering import render, with_goal
from rap_lightning.preferences.templates import passes_through

GAP = re.compile("\ue000([0-9]+)\ue001")  # private-use characters around the number of a turn
Piece = tuple[str | int, ...]
"""Text between control tokens: literal text, and numbers of turns whose text goes there."""


@dataclass(frozen=True)
class Job:
    """One scored pair to encode.

    Attributes:
        history: the turns before the response.
        goal_texts: a prompt is wanted for each; ``None`` is the plain one.
        responses: their texts.
    """

    history: Sequence[Message]
    goal_texts: tuple[str | None, ...]
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Assembled:
    """Ids of the prompt for each goal text, and of each response with its end of turn."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]


@dataclass(frozen=True)
class _Skeleton:
    prompt: list[str | Piece]  # control tokens as text, pieces between them
    tail: list[str | Piece]  # from the prompt's last control token on, with the response
    trims: frozenset[int]  # turns whose text the template trims


class Assembler:
    """Encodes pairs as :class:`Encoder` does, many times faster where that is proved to be the same.

    Args:
        encoder: says how; its tokenizer's chat template decides whether anything can be assembled.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.proof = passes_through(encoder.tokenizer.chat_template)
        if not encoder.special or not _hard_boundaries(encoder):
            self.proof = None
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}
        self._short: dict[str, list[int]] = {}

    def encode(self, jobs: Sequence[Job]) -> list[Assembled | None]:
        """The ids of each job; ``None`` for those that must be encoded sequence by sequence."""
        plans = [self._plan(job) for job in jobs]
        texts = dict.fromkeys(text for plan in plans if plan is not None for text in plan.texts())
        ids = self._tokenise(list(texts))
        return [plan.assemble(ids, self.encoder.special) if plan is not None else None for plan in plans]

    def _plan(self, job: Job) -> _Plan | None:
        encoder = self.encoder
        prompts: list[list[str]] = []
        tails: list[list[str]] = []
        if self.proof is None:
            return None
        skeleton = None
        for text in job.goal_texts:
            turns = with_goal(job.history, text, encoder.placement, system_shown=encoder.system_shown)
            contents = [turn["content"] for turn in turns]
            if not all(map(self._usable, contents)) or any(len(turn) > 2 for turn in turns):
                return None
            skeleton = self._skeleton(tuple(turn["role"] for turn in turns))
            if skeleton is None:
                return None
            prompts.append(_fill(skeleton.prompt, contents, skeleton.trims))
        assert skeleton is not None, "a job has at least one prompt"
        for response in job.responses:
            if not self._usable(response):
                return None
            # the prompt's own part of the tail holds no turn's text, or the tail would not be the same for all goals
            tails.append(_fill(skeleton.tail, [*contents, response], skeleton.trims))
        return _Plan(prompts, tails)

    def _usable(self, text: str) -> bool:
        assert self.proof is not None
        encoder = self.encoder
        return (
            self.proof.holds(text) and not encoder.imitates(text) and not RESERVED.search(text) and "\ue000" not in text
        )

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        last = len(roles)  # the number of the response's turn
        rendered: list[tuple[str, str]] = []
        for around in ("", " "):
            turns = [{"role": r, "content": f"{around}\ue000{i}\ue001{around}"} for i, r in enumerate(roles)]
            answer = {"role": "assistant", "content": f"{around}\ue000{last}\ue001{around}"}
            try:
                prompt = render(self.encoder.tokenizer, turns, generation_prompt=True)
                whole = render(self.encoder.tokenizer, [*turns, answer])
            except Exception:  # the template refuses such a conversation: the Encoder will say so, row by row
                return None
            if not whole.startswith(prompt):
                return None
            rendered.append((prompt, whole))
        (prompt, whole), (_, spaced) = rendered
        trims = set()
        for i in range(last + 1):
            gap = f"\ue000{i}\ue001"
            if whole.count(gap) != 1 or spaced.count(gap) != 1:
                return None
            if f" {gap} " in spaced:
                continue
            if f" {gap}" in spaced or f"{gap} " in spaced:
                return None  # trimmed at one end, or a blank of the template's own
            trims.add(i)
        before, parts = self._split(prompt), self._split(whole)
        start = max((i for i, part in enumerate(before) if isinstance(part, str)), default=None)
        if start is None or any(
            isinstance(bit, int) for part in before[start:] if isinstance(part, tuple) for bit in part
        ):
            return None  # a turn's text runs into the response without a control token between
        if not any(isinstance(part, str) for part in parts[start + 1 :]):
            return None  # no end of turn: the Encoder adds one, and notes it
        return _Skeleton(before, parts[start:], frozenset(trims))

    def _split(self, text: str) -> list[str | Piece]:
        """Control tokens as text, and what stands between them as pieces."""
        parts: list[str | Piece] = []
        for part in self.encoder.split_at_control_tokens(text):
            if part in self.encoder.special:
                parts.append(part)
            elif part:
                bits = GAP.split(part)  # literal, number, literal, ...
                parts.append(tuple(int(bit) if i % 2 else bit for i, bit in enumerate(bits) if i % 2 or bit))
        return parts

    def _tokenise(self, texts: list[str]) -> dict[str, list[int]]:
        known = {text: self._short[text] for text in texts if text in self._short}
        fresh = [text for text in texts if text not in known]
        backend: Any = self.encoder.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoded = backend.encode_batch_fast(fresh, add_special_tokens=False)
        ids = {text: list(result.ids) for text, result in zip(fresh, encoded, strict=True)}
        if len(self._short) < 20_000:  # goals and system messages come back with every pair
            self._short |= {text: tokens for text, tokens in ids.items() if len(text) < 600}
        return known | ids


def _hard_boundaries(encoder: Encoder) -> bool:
    """Whether control tokens are found in any text, whatever stands around them."""
    tokenizer = encoder.tokenizer
    added = list(tokenizer.added_tokens_decoder.values())
    control = [token for token in added if token.content in encoder.special]
    if any(token.lstrip or token.single_word for token in control):
        return False
    if tokenizer.backend_tokenizer.normalizer is not None and any(token.normalized for token in control):
        return False
    others = [token.content for token in added if token.content not in encoder.special]
    return not any(_overlap(other, token.content) for other in others for token in control)


def _overlap(a: str, b: str) -> bool:
    """Whether one text holds the other, or they can share characters at an edge."""
    edges = range(1, min(len(a), len(b)))
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in edges)


@dataclass(frozen=True)
class _Plan:
    prompts: list[list[str]]
    tails: list[list[str]]

    def texts(self) -> list[str]:
        """What is to be tokenised: each piece behind the control token that precedes it."""
        return [text for parts in (*self.prompts, *self.tails) for text in parts]

    def assemble(self, ids: dict[str, list[int]], special: dict[str, int]) -> Assembled | None:
        prompts = [_join(parts, ids) for parts in self.prompts]
        responses = []
        lead = ids[self.prompts[0][-1]]  # from the prompt's last control token on, where the tails begin as well
        for tail in self.tails:
            whole = _join(tail, ids)
            if whole[: len(lead)] != lead:
                return None  # tokens merge across the end of the prompt
            responses.append(whole[len(lead) :])
        return Assembled(prompts, responses)


def _join(parts: Sequence[str], ids: dict[str, list[int]]) -> list[int]:
    return [token for part in parts for token in ids[part]]


def _fill(parts: Sequence[str | Piece], contents: Sequence[str], trims: frozenset[int]) -> list[str]:
    """Texts that are tokenised on their own, each beginning with the control token before it, if there is one.

    A tokenizer may treat the very beginning of a text differently, so a piece goes with what precedes it.
    """
    texts: list[str] = []
    anchor = ""
    for part in parts:
        if isinstance(part, str):
            if anchor:
                texts.append(anchor)
            anchor = part
            continue
        bits = [
            bit if isinstance(bit, str) else contents[bit].strip() if bit in trims else contents[bit] for bit in part
        ]
        texts.append(anchor + "".join(bits))
        anchor = ""
    if anchor:
        texts.append(anchor)
    return texts
