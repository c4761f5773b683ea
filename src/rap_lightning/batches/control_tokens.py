"""Which tokens a text from the data must never become, and the marks that prevent it.

A mark is inserted into whatever reads like a control token, which breaks it; encode.py tokenises marked text piece by
piece, and removes the marks. Thinking tags are not control tokens: those of the data are the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rap_lightning.preferences.pairs import BadRow
from rap_lightning.preferences.thoughts import KNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters, never part of real text:
MARK = chr(0xFDD0)  # inserted into rendered text to break what imitates a control token
OPEN, OPEN_SYSTEM, CLOSE = chr(0xFDD1), chr(0xFDD2), chr(0xFDD3)  # put around turns to find them in rendered text
RESERVED = re.compile(f"[{MARK}{OPEN}{OPEN_SYSTEM}{CLOSE}]")

LOOKALIKE = "text that imitates a control token, kept as text"
MARKUP = re.compile(r"<\|.+\|>|<｜.+｜>|</?(?i:tool_?\w*|system|user|assistant|human|bot)>|\[/?[A-Z_]+\]")
"""Added tokens that are control tokens by their form, though neither declared special nor in the chat template."""
ASCII = "".join(map(chr, range(32, 127)))


class ControlTokens:
    """Text and id of the control tokens of a tokenizer, and how text that reads like them is marked.

    They are the special tokens, and those added ones that the chat template writes or whose form says so: some
    tokenizers do not declare their role markers special.

    Args:
        tokenizer: a fast one.
        templates: the texts of its chat templates.
        written: a short conversation as they write it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, templates: Iterable[str], written: str) -> None:
        thinking = {tag for tags in KNOWN for tag in tags}
        added = [(i, t) for i, t in tokenizer.added_tokens_decoder.items() if len(t.content) > 1]
        source = "\n".join(templates)

        def controls(token: Any) -> bool:
            text = token.content
            in_template = text in written or (text in source and re.search(r"[^\w\s]", text) is not None)
            return bool(token.special or MARKUP.fullmatch(text) or (in_template and not text.isspace()))

        found = [(i, t) for i, t in added if t.content not in thinking and controls(t)]
        self.ids: dict[str, int] = {t.content: i for i, t in found}
        self.pattern = _any_of(self.ids)
        # Added tokens that are matched after normalisation are also made of text that only looks like them, such as
        # full-width brackets under NFKC, or capitals where the normalizer lowers them.
        self._normalizer = tokenizer.backend_tokenizer.normalizer if any(t.normalized for _, t in found) else None
        self._plain_ascii, self._normal = True, self.pattern
        if self._normalizer is not None:
            normalize = self._normalizer.normalize_str
            self._plain_ascii = normalize(ASCII).strip() == ASCII.strip()
            self._normal = _any_of(filter(None, (normalize(t.content).strip() for _, t in found if t.normalized)))

    def imitated_in(self, text: str) -> bool:
        """Return whether a part of the text would become a control token."""
        if self.pattern.search(text) is not None:
            return True
        if self._normalizer is None or (self._plain_ascii and text.isascii()):
            return False
        return self._normal.search(self._normalizer.normalize_str(text)) is not None

    def marked(self, text: str) -> tuple[str, bool]:
        """Return the text with marks in what imitates a control token, and whether there was any."""
        if not self.imitated_in(text):
            return text, False
        text = self.pattern.sub(lambda m: m[0][0] + MARK + m[0][1:], text)
        if self._normalizer is not None and any(map(self.imitated_in, text.split(MARK))):
            # each character that the normalizer changes is tokenised alone, so that it can't complete a token
            normalize = self._normalizer.normalize_str
            text = "".join(c if c == MARK or normalize(c) == c else f"{MARK}{c}{MARK}" for c in text)
            if any(map(self.imitated_in, text.split(MARK))):
                raise BadRow("text", "text that the tokenizer's normalizer turns into a control token")
        return text, True

    def mark(self, value: Any, column: str) -> tuple[Any, bool]:
        """Return a message or a list of tools with marks in all of its texts, names of fields included.

        Raises:
            BadRow: a text holds a noncharacter that is reserved for marks.
        """
        if isinstance(value, str):
            if not value.isascii() and (found := RESERVED.search(value)):
                raise BadRow(column, f"text holds the Unicode noncharacter U+{ord(found[0]):04X}")
            return self.marked(value)
        if isinstance(value, dict):
            pairs = [(self.mark(key, column), self.mark(item, column)) for key, item in value.items()]
            return {key: item for (key, _), (item, _) in pairs}, any(a or b for (_, a), (_, b) in pairs)
        if isinstance(value, list | tuple):
            items = [self.mark(item, column) for item in value]
            return [item for item, _ in items], any(changed for _, changed in items)
        return value, False


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")" if ordered else "(?!)")
