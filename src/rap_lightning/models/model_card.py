"""The README of an exported model, from what its run recorded. What is unknown is left out.

Names come from paths, data and the user's classes, and may hold markup: everything of theirs goes through ``_text``,
``_code``, ``_fenced`` or ``_cell``, and the metadata is written by huggingface_hub.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from rap_lightning.preferences.chat_template import how_to_ask
from rap_lightning.preferences.goal_spec import Wording
from rap_lightning.preferences.goals import is_trained
from rap_lightning.provenance import mask_keys

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

METHOD = "https://arxiv.org/abs/2410.08067"


def model_card(
    facts: Mapping[str, Any], *, adapter: bool, goal_in_template: bool, name: str | None = None,
    base_model: str | None = None, license: str | None = None, title: str | None = None,
) -> str:  # fmt: skip
    """Return the text of README.md, with YAML metadata at its beginning.

    Args:
        facts: as ``callbacks.run_metadata.run_facts`` returns them.
        adapter: the folder holds an adapter, not a whole model.
        goal_in_template: the chat template asks for the best goal.
        name: of the model, for the code examples: a folder or ORG/NAME.
        base_model: its Hub id, where the model was loaded from a folder.
        license: of the model.
        title: the heading; by default the name.
    """
    base = facts.get("base_model") or {}
    hub_base = _hub_id(base_model or (base["name"] if base and not base["local"] else None))
    goal = facts.get("goal")
    goal = goal if is_trained(goal) else None
    sections = [
        _opening(facts, title or name, base_model or base.get("name"), adapter),
        _prompting(goal, goal_in_template, name or "MODEL", adapter),
        _goal(goal),
        _data(facts.get("data")),
        _training(facts),
        _metrics(facts),
        _versions(facts),
    ]
    text = "\n\n".join(section for section in sections if section)
    return mask_keys(f"---\n{_metadata(facts, hub_base, license, adapter)}\n---\n\n{text}\n")


def _metadata(facts: Mapping[str, Any], base_model: str | None, license: str | None, adapter: bool) -> str:
    from huggingface_hub import ModelCardData

    loss = (facts.get("loss") or {}).get("name")
    tags = ["rap-lightning", "preference-alignment", loss.lower() if loss else None]
    tags += ["reward-augmented", "goal-conditioned"] if is_trained(facts.get("goal")) else []
    tags += ["lora", "peft"] if adapter else []
    sources = (facts.get("data") or {}).get("sources", [])
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[_line(tag) for tag in tags if tag],
        license=_line(license) if license else None,
        datasets=[name for s in sources if not s["local"] and (name := _hub_id(s["name"]))] or None,
        ignore_metadata_errors=True,
    )
    return data.to_yaml().strip()


def _opening(facts: Mapping[str, Any], name: str | None, base: str | None, adapter: bool) -> str:
    what = "A LoRA adapter for" if adapter else "Trained from"
    start = f"{what} {_code(base)}" if base else ("A LoRA adapter" if adapter else "A causal language model")
    version = (facts.get("versions") or {}).get("rap-lightning")
    lines = [f"# {_text(name)}\n" if name else "# Model card\n"]
    lines.append(f"{start}, aligned on preference pairs with rap-lightning{f' {version}' if version else ''}.")
    if is_trained(facts.get("goal")):
        states = "The prompt states a goal" if facts["goal"]["best"] is not None else "The adapter's strength is a goal"
        lines.append(
            f"{states}, the score that the response should get (reward-augmented preference "
            f"alignment, [Zhang et al. 2025]({METHOD})); at inference the best one is asked for."
        )
    return "\n".join(lines)


def _prompting(goal: Mapping[str, Any] | None, in_template: bool, name: str, adapter: bool) -> str:
    needs = "transformers and peft" if adapter else "transformers"
    needs += "" if "/" in name else f", in the directory of the folder {_code(name)}"  # without a path: it may be moved
    example = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
chat = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    parts = ["## How to prompt"]
    if goal is None:
        parts.append(f"With {needs}, as any chat model:")
        return "\n\n".join([*parts, _fenced(example, "python")])
    if goal["best"] is None:
        parts.append(
            "The prompt states no goal: it is the strength of the adapter, whose weights are written at "
            f"{goal['adapter_at']:g}. With {needs}, as any chat model, for the best goal:"
        )
        return "\n\n".join([*parts, _fenced(example, "python")])
    if not in_template:
        where = "as the system message" if goal["placement"] != "user" else "before the first user message"
        also = "; where the chat template has no system role, before the first user message" if (
            goal["placement"] == "auto") else ""  # fmt: skip
        parts.append(
            f"The chat template doesn't write goals. Write the goal {where}{also}, with a blank line before what "
            f"follows in the same message:\n\n{_fenced(goal['best'])}"
        )
        return "\n\n".join([*parts, f"With {needs}:", _fenced(example, "python")])
    wording = Wording.of(goal["wording"]) if goal.get("wording") else None
    parts.append(
        "Nothing special is needed: the chat template writes the best goal into every conversation, before a system "
        f"message of your own if there is one. With {needs}:"
    )
    parts.append(_fenced(example, "python"))
    parts.append(f"With `chat_template_kwargs`, {how_to_ask(wording)}")
    other = _other_goal(wording)
    asked = f"\ntokenizer.apply_chat_template(chat, goal={other}, add_generation_prompt=True)" if wording else ""
    parts.append(
        _fenced(f"tokenizer.apply_chat_template(chat, goal=False, add_generation_prompt=True){asked}", "python")
    )
    request: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    if wording:
        request["chat_template_kwargs"] = {"goal": other}
    serve = f'pip install "transformers[serving]"{" peft" if adapter else ""}\ntransformers serve {shlex.quote(name)}'
    curl = "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
    parts.append(
        "They also work with an OpenAI-compatible server that passes them on, as `transformers serve` does. The "
        f"request's `model` must be exactly what the server was started with:\n\n{_fenced(serve, 'sh')}"
    )
    parts.append(_fenced(f"{curl}  -d {shlex.quote(json.dumps(request))}", "sh"))
    return "\n\n".join(parts)


def _other_goal(wording: Wording | None) -> Any:
    """Return a goal for examples, in the middle of the scale."""
    if wording is None:
        return False
    middle = {n.name: round((n.low + n.high) / 2, n.decimals) for n in wording.numbers}
    return middle[wording.alone] if wording.alone else middle


def _goal(goal: Mapping[str, Any] | None) -> str:
    if goal is None:
        return ""
    scale = {k: v for k, v in goal["scale"].items() if k not in ("class", "knots") and v is not None}
    lines = [
        "## Goals",
        f"Template {_code(goal['template'])}, scale {_code(goal['scale'].get('class'))} "
        f"({', '.join(f'{_text(k)} {v:g}' for k, v in scale.items())}).",
    ]
    if goal["best"] is not None:
        lines += ["The best goal reads:", _fenced(goal["best"])]
    if "adapter_at" in goal:
        lines.append(f"The adapter's strength at the best goal is {goal['strength']:g}; at strength 0 it is the base.")
    if goal.get("attributes"):
        lines.append(f"Attributes: {', '.join(map(_text, goal['attributes']))}.")
    return "\n\n".join(lines)


def _data(data: Mapping[str, Any] | None) -> str:
    if not data or not data.get("splits"):
        return ""
    rows = [[s["split"], s["source"], s["rows_read"], s["pairs_kept"], s["relabelled_pairs"]] for s in data["splits"]]
    table = _table(["split", "source", "rows read", "pairs kept", "training pairs"], rows)
    lines = [f"## Data\n\n{table}"]
    words = {"dropped": "dropped", "repaired": "repaired", "truncated": "truncated", "left_out": "left out"}
    for split in data["splits"]:
        for kind, word in words.items():
            for reason, number in sorted(split.get(kind, {}).items(), key=lambda item: -item[1]):
                lines.append(f"- {_text(split['split'])}: {number:,} {word}: {_text(reason)}")
    first, *rest = lines
    return first + ("\n\n" + "\n".join(rest) if rest else "")


def _training(facts: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = []
    if loss := facts.get("loss"):
        rows += [["loss", _Markup(_code(loss["shown"]))]]
    if "reference" in facts:
        rows.append(["reference", facts["reference"]])
    if relabel := (facts.get("data") or {}).get("relabel"):
        shown = f"{relabel} and the best goal for every pair" if facts["data"].get("best_goal") else relabel
        if count := facts["data"].get("goals_per_pair"):
            shown += f", {count} drawn goal{'' if count == 1 else 's'} for every pair"
        for option, half in (("rejected_weight", "rejected-goal"), ("best_goal_weight", "best-goal")):
            if (weight := facts["data"].get(option, 1)) != 1:
                shown += f", the {half} half weighs {weight:g}"
        rows.append(["relabelling", shown])
        if (column := facts["data"].get("weight_column")) is not None:
            rows.append(["weight of a pair's loss", f"column {column} of the data"])
    if adapter := facts.get("adapter"):
        rows += [[f"adapter {key}", value] for key, value in adapter.items()]
    rows += [[key.replace("_", " "), value] for key, value in (facts.get("hyperparameters") or {}).items()]
    rows += [[key, facts[key]] for key in ("seed", "step") if facts.get(key) is not None]
    if not rows:
        return ""
    about = f"\n\n{_without_tags(loss['about'])}" if loss and loss.get("about") else ""
    return f"## Training{about}\n\n{_table(['', ''], rows)}"


def _metrics(facts: Mapping[str, Any]) -> str:
    rows = [[name, f"{value:.4f}"] for name, value in (facts.get("metrics") or {}).items() if "/" in name]
    held_out = [row for row in rows if row[0].startswith(("val/", "test/"))]
    shown = held_out or rows
    return f"## Metrics\n\nAs last measured.\n\n{_table(['metric', 'mean'], shown)}" if shown else ""


def _versions(facts: Mapping[str, Any]) -> str:
    versions = facts.get("versions")
    return "## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in versions.items()) if versions else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(head), *rows]
    cells = [[_cell(value) for value in line] for line in lines]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


class _Markup(str):
    """Text that is Markdown already."""


def _cell(value: Any) -> str:
    if isinstance(value, _Markup):
        return value.replace("|", "\\|")  # a pipe would end the cell, even within code
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _line(value: object) -> str:
    """Return a text in one line, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(value)).strip()


def _without_tags(value: object) -> str:
    """Return a paragraph of Markdown without HTML and images: a docstring may well have links and code."""
    return re.sub(r"^(?=[#>+=~-])", r"\\", _line(value).replace("<", "&lt;").replace("![", "!\\["))


def _text(value: object) -> str:
    """Return a text that Markdown and HTML show as it is."""
    escaped = re.sub(r"([\\`*\[\]|~$]|^[#>+-]|^\d+(?=[.)])|(?<!\w)_|_(?!\w))", r"\\\1", _line(value))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _code(value: object) -> str:
    """Return a text as inline code, which no backtick in it ends."""
    line = _line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _fenced(value: str, language: str = "") -> str:
    """Return a block of code, which no fence in it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", value)), default=0))
    return f"{fence}{language}\n{value}\n{fence}"


def _hub_id(name: str | None) -> str | None:
    """Return a name that the Hub can have; None for an address or anything else."""
    return name if name and _HUB_ID.fullmatch(name) else None
