"""Columns that belong to the prompt in every format: ``system``, ``system_prompt`` and ``history``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rap_lightning.preferences.pairs import BadRow, Message, is_blank, read_messages, read_text

SYSTEM_COLUMNS = ("system", "system_prompt")
CONTEXT_COLUMNS = (*SYSTEM_COLUMNS, "history")
RENAME = "If the column is something else, give it another name with columns {theirs: other}."


def with_context(turns: Sequence[Message], row: Mapping[str, Any]) -> list[Message]:
    """Return a conversation with the system text and the earlier turns that further columns of its row hold.

    What the conversation already has is not repeated.

    Raises:
        BadRow: a column that is neither text nor turns, or system texts that differ.
    """
    earlier = _history(row.get("history"))
    systems = [(name, row[name]) for name in SYSTEM_COLUMNS if row.get(name) is not None]
    texts = [text for name, value in systems if not is_blank(text := _system(value, name))]
    texts += [str(turn["content"]) for turn in (*earlier[:1], *turns[:1]) if turn["role"] == "system"]
    if len({text.strip() for text in texts}) > 1:
        raise BadRow(", ".join(CONTEXT_COLUMNS), "system texts that differ")
    earlier, body = _spoken(earlier), _spoken(turns)
    if body[: len(earlier)] != earlier:
        body = earlier + body
    return [{"role": "system", "content": text} for text in texts[-1:]] + body


def _spoken(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn["role"] != "system"]


def _system(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(column, "not text", value, stops=True, remedy=RENAME)
    return read_text(value, column)


def _history(value: Any) -> list[Message]:
    """Return earlier turns: messages, or [question, answer] pairs as LLaMA-Factory writes them."""
    if value is None or value in ("", []):
        return []
    if not isinstance(value, list):
        raise BadRow("history", "neither messages nor [question, answer] pairs", value, stops=True, remedy=RENAME)
    if all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        roles = ("user", "assistant")
        value = [{"role": r, "content": text} for pair in value for r, text in zip(roles, pair, strict=True)]
    turns = read_messages(value, "history")
    if turns[-1]["role"] not in ("assistant", "system"):
        raise BadRow("history", "earlier turns that do not end with an answer")
    return turns
