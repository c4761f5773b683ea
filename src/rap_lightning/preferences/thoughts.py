"""Thoughts in responses: what a model writes between its thinking tags, before the answer.

Rows bring them as text (``<think>...</think>`` and then the answer, sometimes without the first tag, which R1's prompt
has written already) or as a field ``reasoning_content`` of a message. Both are read into one text with the tags of
:data:`CANONICAL`; rendering writes the tags of the chat template in their place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

Thinking = Literal["keep", "strip", "empty"]


class Tags(NamedTuple):
    """The texts that begin and end thoughts."""

    open: str
    close: str


CANONICAL = Tags("<think>", "</think>")
KNOWN = (
    CANONICAL,
    Tags("[THINK]", "[/THINK]"),  # Magistral
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("◁think▷", "◁/think▷"),  # Kimi
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Tags of models. A chat template has the first of them that it writes or reads, or whose two tags are tokens."""


def tags_of(templates: Iterable[str], tokens: Collection[str]) -> Tags | None:
    """Return the tags of a chat template, given its texts and the added tokens of its tokenizer; None without any."""
    text = "\n".join(templates)
    in_text = (tags for tags in KNOWN if tags.close in text)
    return next(in_text, None) or next((tags for tags in KNOWN if set(tags) <= set(tokens)), None)


def split_thoughts(text: str) -> tuple[str | None, str]:
    """Return thoughts and answer of a response, whitespace included; thoughts are None where there are none.

    >>> split_thoughts("<think>hm</think>yes")
    ('hm', 'yes')
    >>> split_thoughts("hm</think>yes")
    ('hm', 'yes')
    >>> split_thoughts("the tags are <think> and </think>")
    (None, 'the tags are <think> and </think>')
    """
    for own in KNOWN:
        before, found, answer = text.partition(own.close)
        if found:
            head = before.lstrip()
            if head.startswith(own.open):
                return head[len(own.open) :], answer
            if own.open not in head:
                return before, answer
    return None, text


def join_thoughts(thoughts: str, answer: str, tags: Tags = CANONICAL) -> str:
    """Return thoughts, an empty line and the answer as one text.

    >>> join_thoughts("hm", "yes")
    '<think>\\nhm\\n</think>\\n\\nyes'
    """
    inside = thoughts.strip("\n")
    return f"{tags.open}\n{inside}\n{tags.close}\n\n{answer}"


def never_end(text: str) -> bool:
    """Return whether a text begins with thoughts that don't end.

    >>> never_end("<think> hm"), never_end("<think> hm </think> yes")
    (True, False)
    """
    return any(text.lstrip().startswith(tags.open) and tags.close not in text for tags in KNOWN)


def treated(text: str, thinking: Thinking) -> str:
    """Return a response with its thoughts kept, removed (``strip``), or replaced by none in empty tags (``empty``)."""
    if thinking == "keep":
        return text
    thoughts, answer = split_thoughts(text)
    answer = answer if thoughts is None else answer.lstrip()
    return answer if thinking == "strip" else join_thoughts("", answer)
