"""Pairs with a chosen and a rejected response, with scores or without."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rap_lightning.preferences.bounded_json import load_json
from rap_lightning.preferences.formats.base import Row, RowFormat
from rap_lightning.preferences.pairs import (
    BadRow,
    Judged,
    Message,
    Response,
    is_blank,
    read_messages,
    read_number,
    read_text,
    split_response,
)


class ScoredPairs(RowFormat):
    """``chosen`` and ``rejected`` as message lists or as plain text, ``score_chosen`` and ``score_rejected``.

    Message lists contain the whole conversation (as in ultrafeedback_binarized), or only the response if ``prompt`` is
    a message list too. Plain responses answer ``prompt``. Scores of attributes are in ``scores_chosen`` and
    ``scores_rejected``, objects with a number for each name.
    """

    name = "pairs"
    expects = "chosen, rejected, score_chosen, score_rejected (and prompt, where chosen is plain text)"
    columns = ({"chosen", "rejected"},)
    reads = frozenset({"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "tools", "prompt_id"})
    paired = True
    plain: bool = False
    """Responses are text, not message lists."""

    def look(self, rows: Sequence[Row]) -> None:
        """Learn from the first row with a response whether responses are text or message lists in all rows."""
        super().look(rows)
        first = next((row["chosen"] for row in rows if row.get("chosen") is not None), None)
        self.plain = isinstance(first, str)

    def read(self, rows: Sequence[Row]) -> Judged:
        (row,) = rows
        if missing := [name for name in ("chosen", "rejected") if name not in row]:
            scores = [n for n in ("score_chosen", "score_rejected") if self.scored and n not in row]
            raise BadRow(", ".join(missing + scores), "columns missing")
        history, texts = self._plain(row) if self.plain else self._messages(row)
        if texts[0].strip() == texts[1].strip():
            raise BadRow("chosen, rejected", "both responses are the same text")
        responses = [
            Response(text, *self._rewards(row, side), side)
            for text, side in zip(texts, ("chosen", "rejected"), strict=True)
        ]
        return Judged(
            tuple(history), responses, paired=True, tools=tools_of(row), prompt_id=row.get("prompt_id")
        )  # fmt: skip

    def _plain(self, row: Row) -> tuple[list[Message], list[str]]:
        for side in ("chosen", "rejected"):
            if row[side] is not None and not isinstance(row[side], str):
                raise BadRow(side, "not plain text, though the first rows are", row[side], stops=True)
        texts = [read_text(row[side], side) for side in ("chosen", "rejected")]
        if "prompt" not in row:
            history, texts = _spoken(texts)
        else:
            history = as_turns(row["prompt"])
        for side, text in zip(("chosen", "rejected"), texts, strict=True):
            if is_blank(text):
                raise BadRow(side, "an empty response", text)
        return history, texts

    def _messages(self, row: Row) -> tuple[list[Message], list[str]]:
        for side in ("chosen", "rejected"):
            if isinstance(row[side], str):
                raise BadRow(side, "plain text, though the first rows have message lists", row[side], stops=True)
        lead: list[Any] = []
        prompt = row.get("prompt")
        if isinstance(prompt, list):
            lead, prompt = prompt, None
        elif isinstance(prompt, str) and all(_answer_only(row[side]) for side in ("chosen", "rejected")):
            lead, prompt = as_turns(prompt), None
        sides = [self._side(lead, row[side], side) for side in ("chosen", "rejected")]
        (history, _), (other, _) = sides
        if history != other:
            pairs = zip(history, other, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(history), len(other)))
            where = f"chosen[{first}], rejected[{first}]"
            raise BadRow(where, "chosen and rejected answer different conversations")
        if prompt is not None:
            self._check_prompt(prompt, history)
        return history, [text for _, text in sides]

    def _side(self, lead: list[Any], value: Any, side: str) -> tuple[list[Message], str]:
        turns = [*lead, *value] if isinstance(value, list) and value else value
        return split_response(read_messages(turns, side), side)

    def _check_prompt(self, prompt: Any, history: Sequence[Message]) -> None:
        text = read_text(prompt, "prompt")
        if is_blank(text):
            raise BadRow("prompt", "an empty prompt", text)
        turns = [turn["content"] for turn in history if turn["role"] == "user"]
        if text not in (turns[0], turns[-1]) and text.strip() not in (turns[0].strip(), turns[-1].strip()):
            raise BadRow("prompt, chosen[0].content", "prompt is not what the conversation's user turn says")

    def _rewards(self, row: Row, side: str) -> tuple[float, tuple[float, ...]]:
        if self.blind:
            return float("nan"), ()
        attributes = self.wanted(row.get(f"scores_{side}"), f"scores_{side}")
        score = row.get(f"score_{side}")
        if not self.scored and score is None:
            return float("nan"), attributes
        if attributes and f"score_{side}" not in row:  # there is no overall score
            return sum(attributes) / len(attributes), attributes
        return read_number(score, f"score_{side}"), attributes


def _answer_only(side: Any) -> bool:
    return (
        isinstance(side, list) and len(side) == 1 and isinstance(side[0], dict) and side[0].get("role") == "assistant"
    )


def _spoken(texts: Sequence[str]) -> tuple[list[Message], list[str]]:
    """Split whole conversations, "Human: ... Assistant: ...", into turns and the text after the last Assistant."""
    parts = [text.rpartition("\n\nAssistant:") for text in texts]
    if not all(sign for _, sign, _ in parts):
        raise BadRow("prompt", "neither a prompt column nor a conversation of Human and Assistant")
    if parts[0][0] != parts[1][0]:
        raise BadRow("chosen, rejected", "chosen and rejected answer different conversations")
    return spoken_turns(parts[0][0]), [answer.strip() for _, _, answer in parts]


def spoken_turns(prompt: str) -> list[Message]:
    """Return the turns of a prompt written as "Human: ... Assistant: ... Human: ... Assistant:"."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant): ?", prompt.strip("\n"))
    if pieces[0].strip():
        raise BadRow("prompt", "text before the first Human turn")
    names, texts = pieces[1::2], pieces[2::2]
    roles = ["user" if name == "Human" else "assistant" for name in names]
    if roles and roles[-1] == "assistant" and not texts[-1].strip():
        roles, texts = roles[:-1], texts[:-1]
    turns = [{"role": role, "content": text.strip()} for role, text in zip(roles, texts, strict=True)]
    if not turns or turns[-1]["role"] != "user" or is_blank(turns[-1]["content"]):
        raise BadRow("prompt", "the prompt does not end with the user")
    return read_messages(turns, "prompt")


def as_turns(prompt: Any, column: str = "prompt") -> list[Message]:
    """Return a prompt, text or messages, as the turns before a response."""
    if isinstance(prompt, list):
        turns = read_messages(prompt, column)
        if turns[-1]["role"] not in ("user", "tool"):
            raise BadRow(f"{column}[{len(turns) - 1}]", "the prompt does not end with the user")
        return turns
    text = read_text(prompt, column)
    if is_blank(text):
        raise BadRow(column, "an empty prompt", text)
    return [{"role": "user", "content": text}]


def tools_of(row: Row) -> str | None:
    """Return the tools column as JSON text; None for rows without tools."""
    tools = row.get("tools")
    if not tools:
        return None
    if isinstance(tools, str):
        try:
            tools = load_json(tools)
        except ValueError as error:
            raise BadRow("tools", "neither a list of tools nor JSON text of one", tools) from error
    if not isinstance(tools, list):
        raise BadRow("tools", "not a list of tools", tools)
    for i, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(f"tools[{i}]", "a tool without a name", tool)
    return json.dumps(tools, ensure_ascii=False)
