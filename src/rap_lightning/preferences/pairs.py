"""The record every source becomes, and what makes a row bad."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
"""One turn: ``{"role": "system" | "user" | "assistant", "content": text}``."""

SCORED_PAIR_COLUMNS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
"""The columns of HuggingFaceH4/ultrafeedback_binarized that are read."""

ROLES = ("system", "user", "assistant")


class BadRow(Exception):
    """A row that can't become a pair: the column at fault and the reason, in words."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(reason)
        self.column, self.reason = column, reason


@dataclass(frozen=True)
class Pair:
    """Two responses to one conversation, each with the judge's reward. ``responses[0]`` has the higher reward.

    Attributes:
        id: digest of the content, equal wherever the same pair stands.
        history: the turns before the response; the last one is the user's.
        responses: the winner's and the loser's text.
        rewards: their rewards, in the units of the reward scale; ``rewards[0] >= rewards[1]``.
        exchanged: the source had the lower-scored response as chosen.
    """

    id: str
    history: tuple[Message, ...]
    responses: tuple[str, str]
    rewards: tuple[float, float]
    exchanged: bool = False


def read_pair(row: Mapping[str, Any]) -> Pair:
    """A row with the columns of :data:`SCORED_PAIR_COLUMNS` as a :class:`Pair`.

    Raises:
        BadRow: anything that would make training on the row wrong; nothing is guessed.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow("prompt", "prompt is not a non-empty string")
    chosen, rejected = (_conversation(row[column], column) for column in ("chosen", "rejected"))
    rewards = (_score(row["score_chosen"], "score_chosen"), _score(row["score_rejected"], "score_rejected"))
    history, responses = chosen[:-1], (chosen[-1]["content"], rejected[-1]["content"])
    if history != rejected[:-1]:
        raise BadRow("rejected", "chosen and rejected answer different conversations")
    if responses[0].strip() == responses[1].strip():
        raise BadRow("rejected", "both responses are the same text")
    exchanged = rewards[0] < rewards[1]
    if exchanged:  # the reward decides who won, not the column
        responses, rewards = (responses[1], responses[0]), (rewards[1], rewards[0])
    return Pair(pair_id(history, responses), tuple(history), responses, rewards, exchanged)


def pair_id(history: Sequence[Message], responses: tuple[str, str]) -> str:
    """16 hex digits that depend on the text alone."""
    content = json.dumps([list(history), list(responses)], sort_keys=True).encode("utf-8")
    return hashlib.sha256(content).hexdigest()[:16]


def _conversation(value: Any, column: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(column, f"{column} is not a list of messages")
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise BadRow(column, f"{column} has a message without text content")
        if turn.get("role") not in ROLES:
            raise BadRow(column, f"{column} has a message whose role is none of {', '.join(ROLES)}")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise BadRow(column, f"{column} has a system message after the first turn")
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadRow(column, f"{column} does not alternate user and assistant turns, ending with the assistant")
    if not turns[-1]["content"].strip():
        raise BadRow(column, f"{column} ends with an empty response")
    return turns


def _score(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(column, f"{column} is not a finite number")
    return float(value)
