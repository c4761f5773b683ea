"""Tokenizers in the manner of three families of thinking models, with chat templates in our own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import FAMILIES, make_model, make_tokenizer

# Thinks or not, as asked: thoughts of turns before the last question are left out; an answer after it always has a
# thinking block, and a prompt has an empty one with enable_thinking false.
HYBRID = """\
{%- set place = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set place.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- set text, thoughts = m.content, m.reasoning_content -%}
{%- if m.role == 'assistant' and thoughts is not string and '</think>' in text -%}
{%- set thoughts = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[1] -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > place.last -%}
{{- '<think>\\n' + (thoughts or '').strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- text.lstrip('\\n') if m.role == 'assistant' else text -}}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}"""

# The same, but the prompt begins the thoughts.
PREFILLED = HYBRID.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}",
    "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n' -}}",
)

# Every assistant turn loses what is before the end of its thoughts, the last one too, and the prompt begins them.
CUTTING = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ m.content }}{% endif -%}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif -%}
{%- if m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif -%}"""

THINKING: dict[str, dict[str, Any]] = {
    "hybrid": FAMILIES["chatml"] | {"template": HYBRID},
    "prefilled": FAMILIES["chatml"] | {"template": PREFILLED},
    "cutting": {
        "template": CUTTING, "eos": "<|end|>", "bos": "<|begin|>",
        "specials": ["<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"],
    },
}  # fmt: skip


def thinking_tokenizer(family: str) -> Any:
    """A tokenizer of the family, whose thinking tags are tokens that are not declared special."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(family, THINKING[family])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return tokenizer


def thinking_model(folder: Path, family: str) -> Path:
    """A tiny model with that tokenizer."""
    return make_model(folder, tokenizer=thinking_tokenizer(family))
