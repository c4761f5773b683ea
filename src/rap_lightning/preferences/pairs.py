"""Records that rows are read into, and the validation of their values.

A row becomes a :class:`Judged` conversation with :class:`Response` objects, and two of those a :class:`Pair`. Values
that can't be used raise :class:`BadRow`. The ``read_*`` functions validate single values of a row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.preferences.bounded_json import load_json
from rap_lightning.preferences.hashing import hash_pair, hash_text, hash_turns
from rap_lightning.preferences.thoughts import join_thoughts, split_thoughts

Message = dict[str, Any]
"""One turn: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}``, with ``tool_calls`` if it calls a
tool, and ``reasoning_content`` if it has thoughts."""

ROLES = ("system", "user", "assistant")
FIELDS = frozenset({"role", "content", "tool_calls"})
TOOL_FIELDS = frozenset({"name", "tool_call_id"})
"""Fields of messages that are read, the latter where a tool is called or answers."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages hold their thoughts."""
INVISIBLE = frozenset("\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff")
SURROGATE = re.compile("[\ud800-\udfff]")
NUMBERS = (
    '{whats} in quotes are not read: where one is text, others may be "8/10". Write numbers, or convert them in a '
    "function of a row (format my_rows.adapt)."
)
LEAST_WEIGHT = 1e-12  # a step's losses are weighed in float32


class BadRow(Exception):
    """A row, or one response of it, that can't be used.

    Args:
        column: the column at fault, down to the field: ``rejected[1].content``.
        reason: in words, the same for every row with this fault, so that it can be counted.
        found: the value, of which messages show an excerpt.
        stops: the file is not what it claims to be (broken JSON, text in place of a number), so nothing in it should be
            trusted and the run stops. Otherwise the row is dropped and counted.
        by_choice: dropped by an option, not because of a fault.
        remedy: what can be done about it.
        span: lowest and highest number found, if numbers are at fault.
        left_out: the responses of the row that can't be used, if those are the reason.
    """

    def __init__(
        self, column: str, reason: str, found: Any = None, *, stops: bool = False, by_choice: bool = False,
        remedy: str = "", span: tuple[float, float] | None = None, left_out: Sequence[BadRow] = (),
    ) -> None:  # fmt: skip
        super().__init__(reason)
        self.column, self.reason, self.stops, self.by_choice = column, reason, stops, by_choice
        self.remedy, self.span, self.left_out = remedy, span, left_out
        self.found = "" if found is None else shown(found)

    def __reduce__(self) -> tuple[Any, ...]:  # an exception is otherwise pickled with the arguments of Exception
        return type(self), (self.column, self.reason), vars(self)


@dataclass(frozen=True)
class Response:
    """A response and its rewards.

    Attributes:
        text: not blank.
        reward: in the judge's units; nan if there is none.
        attributes: further rewards, in the goal template's order.
        column: of the row, for messages.
    """

    text: str
    reward: float = math.nan
    attributes: tuple[float, ...] = ()
    column: str = ""


@dataclass
class Judged:
    """One conversation and its judged responses. Every row format is read into this.

    Attributes:
        history: the turns before the response; the last one is the user's, or a tool's.
        responses: those that can be used.
        left_out: why others can't be used.
        paired: the row is already a pair, and ``responses[0]`` its chosen response.
        tools: the tools that the conversation may call, as JSON.
        prompt_id: the id of the prompt in the source.
        weight: weight of its pairs' losses.
    """

    history: tuple[Message, ...]
    responses: list[Response]
    left_out: list[BadRow] = field(default_factory=list)
    paired: bool = False
    tools: str | None = None
    prompt_id: Any = None
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        return str(next(turn["content"] for turn in self.history if turn["role"] == "user"))

    @property
    def uses_tools(self) -> bool:
        return any(turn["role"] == "tool" or turn.get("tool_calls") for turn in self.history)


@dataclass(frozen=True)
class Pair:
    """Two responses to one conversation, each with the judge's reward. ``responses[0]`` has the higher reward.

    Attributes:
        id: digest of the content.
        history: the turns before the response.
        responses: the winner's and the loser's text.
        rewards: their rewards in the judge's units, ``rewards[0] >= rewards[1]``; nan if there are none.
        attributes: their further rewards, in the goal template's order.
        tools: the tools that the conversation may call, as JSON.
        exchanged: the lower-scored response was the chosen one in the source.
        tie: the two goals print the same; only the chosen response's goal is trained on.
        place: file, and line or row.
        weight: weight of its loss in the mean over an optimizer step.
    """

    id: str
    history: tuple[Message, ...]
    responses: tuple[str, str]
    rewards: tuple[float, float]
    attributes: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    tools: str | None = None
    exchanged: bool = False
    tie: bool = False
    place: str = ""
    weight: float = 1.0


def carrying(history: Sequence[Message], tools: str | None) -> list[Message]:
    """Return a conversation that carries the tools it may call, as JSON, in its first turn."""
    turns = list(history)
    return turns if tools is None else [{**turns[0], "tools": tools}, *turns[1:]]


def carried(history: Sequence[Message]) -> tuple[list[Message], str | None]:
    """Return what :func:`carrying` was given.

    >>> carried(carrying([{"role": "user", "content": "2 + 2?"}], "[]"))
    ([{'role': 'user', 'content': '2 + 2?'}], '[]')
    """
    if not history:
        return [], None
    first, *rest = history
    return [{name: value for name, value in first.items() if name != "tools"}, *rest], first.get("tools")


def messages_and_tools(history: Sequence[Message]) -> dict[str, Any]:
    """Return the columns of a row that hold a conversation: ``messages``, and ``tools`` if it carries any."""
    turns, tools = carried(history)
    return {"messages": turns} | ({} if tools is None else {"tools": json.loads(tools)})


def make_pair(judged: Judged, first: Response, second: Response, place: str = "") -> Pair:
    """Return the pair of two responses; the reward decides which one wins, not the column."""
    exchanged = second.reward > first.reward
    win, lose = (second, first) if exchanged else (first, second)
    return Pair(
        id=pair_id(judged.history, win.text, lose.text),
        history=judged.history,
        responses=(win.text, lose.text),
        rewards=(win.reward, lose.reward),
        attributes=(win.attributes, lose.attributes),
        tools=judged.tools,
        exchanged=exchanged and judged.paired,
        place=place,
        weight=judged.weight,
    )


def pair_id(history: Sequence[Message], winner: str, loser: str) -> str:
    """Return 16 hex digits that depend on the text of a conversation and two responses in this order."""
    return f"{hash_pair(hash_turns(history), hash_text(winner), hash_text(loser)):016x}"


def shown(value: Any, limit: int = 40) -> str:
    """Return a value for messages: short, and with terminal control characters escaped.

    >>> shown("a\\x1b[31m" + "b" * 100, 16)
    "'a\\\\x1b[31mbbbbbb..."
    """
    text = ascii(value[: limit * 2] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def is_blank(text: str) -> bool:
    """Return whether a text has only whitespace and zero-width characters."""
    text = text.strip()
    if not text:
        return True
    return text[0] in INVISIBLE and all(c in INVISIBLE or c.isspace() for c in text)


def read_text(value: Any, column: str) -> str:
    """Return a text unchanged; raise BadRow for other types and for unpaired surrogates."""
    if not isinstance(value, str):
        raise BadRow(column, "not text" if value is not None else "null", value)
    if not value.isascii() and (found := SURROGATE.search(value)):
        raise BadRow(column, "half a surrogate pair, which no encoding can write", found[0])
    return value


def read_number(value: Any, column: str, what: str = "score") -> float:
    """Return a finite number; raise BadRow for anything else, including numbers in quotes."""
    if type(value) is float or type(value) is int:
        if -1e300 < value < 1e300:  # compare before converting: an integer may have any number of digits
            return float(value)
        raise BadRow(column, "not a finite number", value)
    if value is None or value == "":
        raise BadRow(column, f"no {what}: null or empty", value)
    if isinstance(value, str):
        remedy = NUMBERS.format(whats=f"{what.capitalize()}s")
        raise BadRow(column, f"a {what} that is text, not a number", value, stops=True, remedy=remedy)
    if isinstance(value, bool | Mapping | list):
        raise BadRow(column, f"a {what} that is {_kind(value)}, not a number", value, stops=True)
    try:
        return read_number(float(value), column, what)
    except (TypeError, ValueError) as error:
        raise BadRow(column, f"a {what} that is {_kind(value)}, not a number", value, stops=True) from error


def read_weight(value: Any, column: str) -> float:
    """Return the weight of a pair; raise BadRow for what can't weigh a loss. A weight of 0 leaves the row out."""
    weight = read_number(value, column, "weight")
    if weight == 0:
        raise BadRow(column, "a weight of 0", by_choice=True)
    if weight < 0:
        raise BadRow(column, "a weight below 0", value)
    if not LEAST_WEIGHT <= weight <= 1 / LEAST_WEIGHT:
        raise BadRow(column, f"a weight that is not from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}", value)
    return weight


def read_messages(value: Any, column: str) -> list[Message]:
    """Return messages, each with role and content, in an order that chat templates accept."""
    if value is None:
        raise BadRow(column, "null")
    if not isinstance(value, list):
        raise BadRow(column, f"{_kind(value)} where a list of messages is expected", value, stops=True)
    if not value:
        raise BadRow(column, "an empty conversation")
    turns: list[Message] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            reason = f"{_kind(turn)} where a message with role and content is expected"
            raise BadRow(f"{column}[{i}]", reason, turn, stops=turn is not None)
        where = f"{column}[{i}]"
        role, calls = turn.get("role"), _read_calls(turn.get("tool_calls"), f"{where}.tool_calls")
        if role not in ROLES and role != "tool":
            raise BadRow(f"{where}.role", "a role that is none of system, user, assistant, tool", role)
        content = turn.get("content")
        if content is None and calls:
            content = ""
        if isinstance(content, list):
            content = _join_parts(content, f"{where}.content")
        if type(content) is not str or not content.isascii():  # most texts are ASCII, and need no look
            content = read_text(content, f"{where}.content")
        message: Message = {"role": role, "content": content}
        if calls:
            message["tool_calls"] = calls
        if role == "tool" or calls:
            message |= {name: turn[name] for name in sorted(TOOL_FIELDS) if turn.get(name)}
        if role == "assistant" and len(turn) > 2 and (thoughts := read_thoughts(turn, where)):
            message["reasoning_content"] = thoughts
        turns.append(message)
    _check_order(turns, column)
    return turns


def _join_parts(parts: Sequence[Any], column: str) -> str:
    """Return the text of content that is a list of parts, ``{"type": "text", "text": ...}``."""
    texts = []
    for i, part in enumerate(parts):
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            part = part["text"]
        if not isinstance(part, str):
            raise BadRow(f"{column}[{i}]", "a part of the content that is not text", part)
        texts.append(part)
    return "".join(texts)


def read_thoughts(fields: Mapping[str, Any], column: str) -> str:
    """Return the thoughts of a message or a response, from the field that holds them; empty without any."""
    for name in REASONING:
        if (value := fields.get(name)) is not None:
            text = read_text(value, f"{column}.{name}")
            if not is_blank(text):
                return text
    return ""


def with_thoughts(thoughts: str, content: str, column: str) -> str:
    """Return a response with its thoughts before it, which it may have there already."""
    if not thoughts:
        return content
    inside, answer = split_thoughts(content)
    if inside is None or not inside.strip():
        return join_thoughts(thoughts, answer)
    if inside.strip() != thoughts.strip():
        raise BadRow(column, "thoughts in a field, and others in the content")
    return content


def _read_calls(calls: Any, column: str) -> list[dict[str, Any]]:
    """Return tool calls; arguments that are JSON text, as APIs send them, become what they hold."""
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadRow(column, "not a list of tool calls", calls)
    found = []
    for i, call in enumerate(calls):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow(f"{column}[{i}]", "a tool call without a function's name", call)
        if isinstance(inner.get("arguments"), str):
            try:
                inner = inner | {"arguments": load_json(inner["arguments"])}
            except ValueError as error:
                where = f"{column}[{i}].arguments"
                raise BadRow(where, "arguments of a tool call that are not JSON", inner["arguments"]) from error
        found.append(call | {"function": inner} if "function" in call else inner)
    return found


def _check_order(turns: Sequence[Message], column: str) -> None:
    expected: tuple[str, ...] = ("system", "user")
    for i, turn in enumerate(turns):
        role = turn["role"]
        if role not in expected:
            reason = "a system message after the first turn" if role == "system" else None
            reason = reason or f"turns out of order: expected {' or '.join(expected)}, found {role}"
            raise BadRow(f"{column}[{i}]", reason)
        if role == "assistant":
            expected = ("tool",) if turn.get("tool_calls") else ("user",)
        else:
            expected = {"system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}[role]


def split_response(turns: list[Message], column: str) -> tuple[list[Message], str]:
    """Return the turns before the last one, and the last one's text."""
    *history, last = turns
    where = f"{column}[{len(history)}]"
    if last["role"] != "assistant":
        raise BadRow(where, "the conversation does not end with the assistant")
    if last.get("tool_calls"):
        raise BadRow(where, "the response is a tool call, not text")
    if is_blank(last["content"]):
        raise BadRow(f"{where}.content", "an empty response", last["content"])
    return history, with_thoughts(last.get("reasoning_content", ""), str(last["content"]), where)


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null" if value is None else f"a {type(value).__name__}")
