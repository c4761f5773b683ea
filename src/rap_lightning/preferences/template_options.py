"""Which of a tokenizer's chat templates renders, and the values of its switches (``chat_template_kwargs``).

The values are written into the template as defaults, in one line before it. So everything that renders with the
tokenizer uses them, they are part of every digest of the template, and an exported folder has them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.chat_template import SEAM, literal, variables_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN = "{#- rap-lightning: chat_template_kwargs "
MIDDLE = " -#}"
END = "{#- rap-lightning: the chat template follows. -#}" + SEAM
TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "goal")
"""Variables that are not switches: rendering sets them."""


@dataclass(frozen=True)
class TemplateOptions:
    """A choice of chat template and its switches.

    Attributes:
        name: of several named templates; None is the one that is called default.
        kwargs: values of variables of the template.
    """

    name: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := [name for name in self.kwargs if name in TAKEN or not name.isidentifier()]:
            raise ConfigError(
                f"chat_template_kwargs: {taken[0]!r} can't be set, rendering sets it or it is no variable of Jinja. "
                "Switches have names such as enable_thinking."
            )

    def __bool__(self) -> bool:
        return self.name is not None or bool(self.kwargs)

    def applied(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Change the tokenizer's chat template in place, and return the tokenizer.

        Raises:
            ConfigError: there is no template of this name, or none that reads a variable of ``kwargs``.
        """
        template = tokenizer.chat_template
        if isinstance(template, dict):
            name = "default" if self.name is None else self.name
            if name not in template:
                chosen = "none of them is called default" if self.name is None else f"and none called {self.name}"
                raise ConfigError(
                    f"the tokenizer has chat templates named {', '.join(sorted(template))}, {chosen}. Choose one with "
                    f"chat_template {min(template)}."
                )
            if self.name is not None:
                template = template[name]
        elif self.name not in (None, "default"):
            raise ConfigError(
                f"chat_template {self.name}: the tokenizer has one chat template, without a name. Leave the option out."
            )
        if template:
            texts = template if isinstance(template, dict) else {"": template}
            self._check(texts)
            written = {name: self._written(text) for name, text in texts.items()}
            tokenizer.chat_template = written if isinstance(template, dict) else written[""]
        return tokenizer

    def _check(self, texts: Mapping[str, str]) -> None:
        read = [variables_of(text) for text in texts.values()]
        known = set[str]().union(*(names for names in read if names is not None))
        if None not in read and (idle := [name for name in self.kwargs if name not in known]):
            switches = ", ".join(sorted(known.difference(TAKEN))) or "none"
            raise ConfigError(
                f"chat_template_kwargs: {idle[0]} has no effect, since the chat template doesn't read it. It reads "
                f"{switches}. Remove it."
            )

    def _written(self, text: str) -> str:
        values, own = split_defaults(text)
        values = values | dict(self.kwargs)
        if not values:
            return own
        shown = json.dumps(values, ensure_ascii=False).replace("#}", "#\\u007d")  # must not end the comment
        sets = [
            f"{{%- if {name} is not defined -%}}{{%- set {name} = {literal(value)} -%}}{{%- endif -%}}"
            for name, value in values.items()
        ]
        return "".join([BEGIN, shown, MIDDLE, *sets, END, own])


def defaults_of(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Return the values that a tokenizer's chat template, or each of its named ones, was given."""
    text = template.get("default") if isinstance(template, Mapping) else template
    return split_defaults(text or "")[0]


def split_defaults(template: str) -> tuple[dict[str, Any], str]:
    """Return the values that a template was given, and the template without them."""
    if not template.startswith(BEGIN):
        return {}, template
    head, _, own = template.partition(END)
    values: dict[str, Any] = json.loads(head[len(BEGIN) :].partition(MIDDLE)[0])
    return values, own
