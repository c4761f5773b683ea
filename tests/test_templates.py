"""A chat template is taken to write texts as they are only where that can be proved from its source."""

import pytest

from conftest import FAMILIES
from rap_lightning.preferences.templates import PassesThrough, passes_through

LOOP = "{% for m in messages %}BODY{% endfor %}"

THINKING = "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}"
THINKING += "{% endif %}{{ c }}"
PARTS = "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
PARTS += "{% endif %}"

PROVED = {
    "{{ m['role'] }}: {{ m['content'] }}": PassesThrough((), False),
    "{{ m.content | trim }}": PassesThrough((), False),
    "{{ m['content'].strip() + eos_token }}": PassesThrough((), False),
    "{{ m.content.lstrip('\\n') }}": PassesThrough((), True),
    THINKING: PassesThrough(("</think>",), True),
    PARTS: PassesThrough((), False),
    "{% if m.content.startswith('<tool>') %}x{% endif %}{{ m.content }}": PassesThrough(("<tool>",), False),
    "{% if m.role == 'system' %}{{ 'S' ~ m.content }}{% elif loop.last %}{{ m.content }}{% endif %}": (
        PassesThrough((), False)
    ),
    "{{ '<|' + m.role + '|>' + (m.content if m.content is not none else '') }}": PassesThrough((), False),
}
REFUSED = [
    "{{ m.content | upper }}",
    "{{ m.content[:100] }}",
    "{{ m.content | length }}{{ m.content }}",
    "{% if m.content == 'x' %}y{% endif %}{{ m.content }}",
    "{% if m.content | length > 5 %}y{% endif %}{{ m.content }}",
    "{{ m.content.replace('a', 'b') }}",
    "{{ m | tojson }}",
    "{{ m.items() | list }}",
    "{% for part in m.content %}{{ part }}{% endfor %}",
    "{{ loop.previtem.content | upper }}",
    "{% set ns = namespace(t=m.content) %}{{ ns.t | title }}",
    "{% if m.content in ['a', 'b'] %}y{% endif %}",
    "{% if m.content > 'k' %}y{% endif %}{{ m.content }}",
    "{{ m.content.split(' ')[0] | upper }}",
    "{% set c = m.content %}{% set d = c %}{{ d | replace('a', 'b') }}",
    "{{ {'a': m.content}['a'] | upper }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% set c %}{{ m.content }}{% endset %}{{ c | upper }}",
    "{% if m.content == messages[loop.index0 - 1].content %}again{% endif %}{{ m.content }}",
    "{{ m.content.strip('*') }}",
    "{{ m.content | trim(chars='*') }}",
    "{% set k = 'content' %}{{ m[k] | length }}",
    "{% for part in m['content'] %}{{ part }}{% endfor %}",
    "{% set s = messages[0] %}{% set s = s.content %}{% if s | length > 5 %}long{% endif %}{{ m.content }}",
    "{{ m.content.strip()[0] }}",
    "{% set ns = namespace(x='') %}{% set ns.x = m.content %}{% set o = ns %}{{ o.x | upper }}",
]


@pytest.mark.parametrize("body", PROVED, ids=range(len(PROVED)))
def test_what_only_writes_texts_is_proved(body: str) -> None:
    assert passes_through(LOOP.replace("BODY", body)) == PROVED[body]


@pytest.mark.parametrize("body", REFUSED, ids=range(len(REFUSED)))
def test_what_looks_into_texts_is_not(body: str) -> None:
    assert passes_through(LOOP.replace("BODY", body)) is None


def test_macros_and_broken_templates_are_not_proved() -> None:
    assert passes_through(LOOP.replace("BODY", "{% macro f() %}{{ m.content }}{% endmacro %}{{ f() | upper }}")) is None
    assert passes_through({"default": "x"}) is None
    assert (
        passes_through("{% macro f(x) %}{{ x | upper }}{% endmacro %}" + LOOP.replace("BODY", "{{ f(m.content) }}"))
        is None
    )
    assert passes_through("{% for m in messages %}") is None


def test_the_families_of_the_tests_are_proved() -> None:
    assert all(passes_through(spec["template"]) == PassesThrough((), False) for spec in FAMILIES.values())


def test_conditions_are_asked_of_each_text() -> None:
    conditions = PassesThrough(("</think>",), True)
    assert conditions.holds("plain text")
    assert not any(map(conditions.holds, ["a </think> b", " a", "a\n", "", "  "]))
