"""Chat templates that write goals: a few lines of Jinja before the model's own template rewrite ``messages``.

A plain chat then asks for the best goal, as training wrote it; ``chat_template_kwargs`` can ask for another
(``goal=7.5``) or for none (``goal=false``). The model's own template follows unchanged, so its tools and switches work
as before. :func:`bake` writes such a template, :func:`unbaked` gives the model's own back. The Jinja itself is at the
end of the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goal_spec import Wording
from rap_lightning.preferences.rendering import SEPARATOR

BEGIN = "{#- rap-lightning: a goal in the prompt."
END = "{#- rap-lightning: the model's own chat template follows. -#}"
# an empty expression at the end: the end of a block or comment would remove a newline at the start of the own template
SEAM = '{{- "" }}'


def bake(template: str, goal: Mapping[str, Any], placement: Literal["system", "user"], *, system_shown: bool) -> str:
    """Return a chat template that writes goals; a goal that the template already writes is replaced.

    Raises:
        ConfigError: the model's template uses a variable named ``goal``.
    """
    own = unbaked(template)
    if "goal" in (variables_of(own) or ()):
        raise ConfigError(
            "the model's chat template already has a variable named 'goal', so that name can't be used to ask for a "
            "goal. Leave the template as it is: --goal_in_template false"
        )
    wording = Wording.of(goal["wording"]) if goal.get("wording") else None
    rewrite = SYSTEM if placement == "system" else BESIDE_SYSTEM if system_shown else BEFORE_USER
    how = how_to_ask(wording).replace("#}", "# }")  # names must not end the comment
    parts = [
        f"{BEGIN}\nA plain chat asks for the best. With chat_template_kwargs, {how}\n-#}}",
        "{%- if goal is not defined -%}",
        _set("rap_goal", goal["best"]),
        "{%- elif goal is none or goal is false -%}",
        "{%- set rap_goal = none -%}",
        "{%- else -%}",
        *([FIXED] if wording is None else _explicit(wording)),
        "{%- endif -%}",
        _set("rap_gap", SEPARATOR),
        SPLIT,
        *rewrite,
        END + SEAM,
    ]
    prefix = "\n".join(parts)
    if unbaked(prefix):
        raise ConfigError(
            "the goal's text contains the marker that ends what export writes into a chat template; reword it."
        )
    return prefix + own


def unbaked(template: str) -> str:
    """Return the model's own chat template, with which training and prediction render."""
    if not template.startswith(BEGIN):
        return template
    _, _, own = template.partition(END + SEAM)
    return own


def read_tokenizer(path: str, **options: Any) -> Any:
    """Load a tokenizer and try it on a text: with some damaged values of its files, it is loaded and can't encode."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    tokenizer(["a text"], add_special_tokens=False)
    return tokenizer


def restore_own_template(tokenizer: Any) -> Any:
    """Reset an exported model's tokenizer to the chat template of training, which writes no goals by itself."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        tokenizer.chat_template = unbaked(template)
    elif isinstance(template, dict):
        tokenizer.chat_template = {name: unbaked(text) for name, text in template.items()}
    return tokenizer


def how_to_ask(wording: Wording | None) -> str:
    """Return a sentence that says what values ``goal`` takes."""
    none = "goal=false asks for none"
    if wording is None:
        return f"{none}; other goals aren't available, since the goal template writes texts of its own."
    ranges = ", ".join(f"{n.name} from {n.low:g} to {n.high:g}" for n in wording.numbers)
    if len(wording.numbers) == 1 and wording.alone is not None:
        (number,) = wording.numbers
        return f"goal=NUMBER asks for another, from {number.low:g} to {number.high:g}; {none}."
    text = f"goal={{name: NUMBER}} asks for others ({ranges}; those left out are the best)"
    if wording.alone is not None:
        text += f"; goal=NUMBER sets {wording.alone} alone"
    return f"{text}; {none}."


def _explicit(wording: Wording) -> list[str]:
    """Return Jinja that writes the goal's text, with the numbers that the caller asks for, into ``rap_goal``."""
    names = [number.name for number in wording.numbers]
    rows = [
        [n.name, n.low, n.high, n.decimals, f"%.{n.decimals}f", wording.best(n), after]
        for n, after in zip(wording.numbers, wording.parts[1:], strict=True)
    ]
    alone = f"{{%- set rap_asked = {{{literal(wording.alone)}: goal}} -%}}"
    refused = '{{- raise_exception("goal must be a mapping of numbers, or false") -}}'
    asked = [
        "{%- if goal is mapping -%}",
        "{%- set rap_asked = goal -%}",
        "{%- else -%}",
        alone if wording.alone is not None else refused,
        "{%- endif -%}",
    ]
    start = f"{{%- set rap_text = namespace(value={literal(wording.parts[0])}) -%}}"
    return [*asked, _set("rap_names", names), _set("rap_rows", rows), start, NUMBERS]


def _set(name: str, value: Any) -> str:
    return f"{{%- set {name} = {literal(value)} -%}}"


def literal(value: Any) -> str:
    """Return a Jinja literal of a plain value."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value, ensure_ascii=False)  # Jinja knows no escaped surrogate pairs
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(str(key))}: {literal(item)}" for key, item in value.items()) + "}"
    raise ConfigError(f"chat_template_kwargs: {value!r} is not a plain value.")


def variables_of(template: str) -> set[str] | None:
    """Return the names that a template reads from its context; None if it uses tags that plain Jinja doesn't have."""
    import jinja2
    from jinja2 import meta

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateError:
        return None
    return set(meta.find_undeclared_variables(tree))


FIXED = """\
{{- raise_exception("goal: this template has only the best goal, which is the default, and goal=false") -}}"""

# A row is name, low, high, decimals, format, the best as printed, and the words that follow. An engine whose "format"
# filter isn't Python's leaves the percent sign; there, a number must be given with no more decimals than are printed.
NUMBERS = """\
{%- for rap_name in rap_asked -%}
{%- if rap_name not in rap_names -%}
{{- raise_exception("goal: no number is named " ~ rap_name ~ "; there are " ~ (rap_names | join(", "))) -}}
{%- endif -%}
{%- endfor -%}
{%- for rap_row in rap_rows -%}
{%- if rap_row[0] in rap_asked -%}
{%- set rap_value = rap_asked[rap_row[0]] -%}
{%- set rap_range = " must be a number from " ~ rap_row[1] ~ " to " ~ rap_row[2] ~ ", found " ~ rap_value -%}
{%- if rap_value is boolean or rap_value is not number or not (rap_value >= rap_row[1] and rap_value <= rap_row[2]) -%}
{{- raise_exception("goal: " ~ rap_row[0] ~ rap_range) -}}
{%- endif -%}
{%- set rap_shown = rap_row[4] | format(rap_value) -%}
{%- if "%" in rap_shown -%}
{%- set rap_shown = rap_value | string -%}
{%- set rap_split = rap_shown.split(".") -%}
{%- if rap_split | length > 1 and rap_split[1] != "0" and rap_split[1] | length > rap_row[3] -%}
{{- raise_exception("goal: " ~ rap_row[0] ~ " takes at most " ~ rap_row[3] ~ " decimals, found " ~ rap_value) -}}
{%- endif -%}
{%- endif -%}
{%- if "." in rap_shown -%}
{%- set rap_shown = rap_shown.rstrip("0").rstrip(".") -%}
{%- endif -%}
{%- if rap_shown == "-0" -%}
{%- set rap_shown = "0" -%}
{%- endif -%}
{%- else -%}
{%- set rap_shown = rap_row[5] -%}
{%- endif -%}
{%- set rap_text.value = rap_text.value ~ rap_shown ~ rap_row[6] -%}
{%- endfor -%}
{%- set rap_goal = rap_text.value -%}"""

# Split the leading system messages from the turns after them. Later system messages stay where they are.
SPLIT = """\
{%- set rap = namespace(system=[], rest=[]) -%}
{%- for rap_turn in messages -%}
{%- if rap_turn["role"] == "system" and not rap.rest -%}
{%- set rap.system = rap.system + [rap_turn["content"]] -%}
{%- else -%}
{%- set rap.rest = rap.rest + [rap_turn] -%}
{%- endif -%}
{%- endfor -%}
{%- set rap_lead = [rap_goal] if rap_goal is not none else [] -%}"""

ONLY_TEXTS = """\
{%- for rap_one in rap.system -%}
{%- if rap_one is not string -%}
{{- raise_exception("a system message made of parts can't be joined with another text here: send a text") -}}
{%- endif -%}
{%- endfor -%}"""

# Put the texts of rap_lead before the content rap_last, which is a text, or a list of parts as some servers send it.
JOIN = """\
{%- if rap_last is string -%}
{%- set rap_top = (rap_lead + [rap_last]) | join(rap_gap) -%}
{%- elif not rap_lead -%}
{%- set rap_top = rap_last -%}
{%- elif rap_last and rap_last[0]["type"] == "text" -%}
{%- set rap_first = (rap_lead + [rap_last[0]["text"]]) | join(rap_gap) -%}
{%- set rap_top = [{"type": "text", "text": rap_first}] + rap_last[1:] -%}
{%- else -%}
{%- set rap_top = [{"type": "text", "text": (rap_lead | join(rap_gap)) ~ rap_gap}] + rap_last -%}
{%- endif -%}"""

# Where training wrote the goal as a system message: the goal, then the conversation's own system message.
SYSTEM = (
    """\
{%- set rap_top = rap_lead | join(rap_gap) -%}
{%- if rap.system | length > 1 -%}""",
    ONLY_TEXTS,
    """\
{%- endif -%}
{%- if rap.system -%}
{%- set rap_lead = rap_lead + rap.system[:-1] -%}
{%- set rap_last = rap.system[-1] -%}""",
    JOIN,
    """\
{%- endif -%}
{%- set messages = ([{"role": "system", "content": rap_top}] if rap_top else []) + rap.rest -%}""",
)

_TO_USER = (
    """\
{%- if rap_lead -%}
{%- if not rap.rest or rap.rest[0]["role"] != "user" -%}
{{- raise_exception("the goal is written before the first user turn, and this conversation doesn't begin with one") -}}
{%- endif -%}
{%- set rap_last = rap.rest[0]["content"] -%}""",
    JOIN,
    """\
{%- set rap.rest = [dict(rap.rest[0], content=rap_top)] + rap.rest[1:] -%}
{%- endif -%}""",
)

# Where the template has no system role: the goal, then a system message's text, then the first user turn's text.
BEFORE_USER = (ONLY_TEXTS, "{%- set rap_lead = rap_lead + rap.system -%}", *_TO_USER, "{%- set messages = rap.rest -%}")

# Where training wrote the goal into the user turn although there is a system role: system messages stay.
BESIDE_SYSTEM = (*_TO_USER, "{%- set messages = messages[:rap.system | length] + rap.rest -%}")
