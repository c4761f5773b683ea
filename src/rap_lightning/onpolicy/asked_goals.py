"""Which goal a model is asked for, and a chat template without a goal of its own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rap_lightning.errors import ConfigError
from rap_lightning.preferences import scales
from rap_lightning.preferences.goals import GoalTemplate, Placement, is_trained
from rap_lightning.preferences.rendering import render
from rap_lightning.preferences.scales import RewardScale

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation

GoalOption: TypeAlias = float | Literal["best", "none"]
OURS = "rap_lightning."
Record = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A goal to ask for: its text, how it is printed, and where it goes. Text and print are None without a goal.

    With guidance, ``against`` is the goal that it pushes away from.
    """

    text: str | None
    printed: str | None
    placement: Placement = "auto"
    against: Asked | None = None


def read_record(path: str) -> Record | None:
    """The goal record in a model's folder (or a run's, or the file itself); None where there is none."""
    place = Path(path).expanduser()
    file = place if place.name == "goal.json" else place / "goal.json"
    if not file.is_file():
        return None
    try:
        record: Record = json.loads(file.read_text(encoding="utf-8"))
        record["best"], record["placement"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a goal record as fit and export write it: {error}.") from error
    return record


def template_of(record: Record) -> GoalTemplate:
    """The goal template that a record is of.

    Only classes of this package are made again: a file says nothing about which code is run.

    Raises:
        ConfigError: the template is another's, or doesn't write what the record says.
    """
    path = str(record.get("template"))
    module, _, name = path.rpartition(".")
    advice = "Only its best goal can be asked for; for another, name the template with --template."
    if not path.startswith(OURS):
        raise ConfigError(f"the model's goal template is {path}, which is not of this package. {advice}")
    try:
        kind = getattr(importlib.import_module(module), name)
        options: dict[str, Any] = {"scale": _scale_of(record["scale"]), "placement": record["placement"]}
        if record.get("attributes"):
            options["attributes"] = list(record["attributes"])
            options["overall"] = record["overall"]
            options["attribute_scale"] = _scale_of(record["attribute_scale"])
        template: GoalTemplate = kind(**options)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"the model's goal record can't be read: {error!r}. {advice}") from error
    if template.write(template.best, template.best_attributes) != record["best"]:
        raise ConfigError(f"the model's goal record was written by another version of {path}. {advice}")
    return template


def _scale_of(numbers: dict[str, Any]) -> RewardScale:
    options = dict(numbers)
    kind = getattr(scales, options.pop("class"))
    made: RewardScale = kind(**options)
    return made


def config_of(thing: Any) -> dict[str, Any]:
    """A goal template or scale as it would stand in a config: class path and arguments, fitted numbers included.

    Raises:
        ConfigError: an argument isn't kept as an attribute of its own name.
    """
    if isinstance(thing, RewardScale):
        arguments = dict(thing.numbers())
    else:
        names = [n for n in inspect.signature(type(thing).__init__).parameters if n != "self"]
        if missing := [name for name in names if not hasattr(thing, name)]:
            raise ConfigError(
                f"{type(thing).__qualname__} must keep its argument {missing[0]!r} as an attribute of that name, to be "
                "written into a config."
            )
        arguments = {name: getattr(thing, name) for name in names}
    plain = {
        name: config_of(value) if isinstance(value, RewardScale) else list(value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    return {"class_path": f"{type(thing).__module__}.{type(thing).__qualname__}", "init_args": plain}


def resolve(option: GoalOption | None, record: Record | None, template: GoalTemplate | None) -> Asked:
    """The goal that is asked for.

    Args:
        option: a number on the scale that goals state, ``best``, ``none``; None is ``best`` where the model was
            trained with goals, or a template is given.
        record: the model's.
        template: the user's; by default that of the record.

    Raises:
        ConfigError: a goal is asked of a model that has none, or outside the scale.
    """
    if option == "none":
        return Asked(None, None)
    if option is None and template is None and not is_trained(record):
        return Asked(None, None)
    if record is None and template is None:
        raise ConfigError(
            f"--goal {option}: the model's folder has no goal.json, so how goals read isn't known. Name the "
            "template: --template OverallGoal"
        )
    if template is not None and template.scale.needs_fit:
        raise ConfigError("--template: the scale's open numbers can't be fitted here; give them (goal.json has them).")
    if option in (None, "best") and template is None:
        assert record is not None, "one of the two is there"
        return Asked(record["best"], _printed_best(record), record["placement"])
    template = template or template_of(record or {})
    goal = template.best if option in (None, "best") else float(option)
    low, high = template.scale.low, template.scale.high
    if not low <= goal <= high:
        raise ConfigError(f"--goal must lie on the scale of {low:g} to {high:g}, found {goal:g}")
    best = template.best_attributes
    return Asked(template.write(goal, best), template.printed(goal, best), template.placement)


def guided(
    asked: Sequence[Asked], generation: Generation, record: Record | None, template: GoalTemplate | None
) -> list[Asked]:
    """The goals with the low goal that guidance pushes away from; as they are, without guidance.

    Args:
        asked: as :func:`resolve` gave them.
        generation: has the weight and the low goal.
        record: the model's.
        template: the user's; by default that of the record.

    Raises:
        ConfigError: how the low goal reads isn't known, it is outside the scale, or it is the only one that is asked.
    """
    if generation.guidance == 0:
        return list(asked)
    if record is None and template is None:
        raise ConfigError(
            "--guidance: the model's folder has no goal.json, so how the low goal reads isn't known. Name the "
            "template: --template OverallGoal"
        )
    if template is None and generation.against != "none":
        template = template_of(record or {})
    text, printed = (None, "none") if template is None else template.low(generation.against)
    placement = template.placement if template is not None else (record or {})["placement"]
    if {one.text for one in asked} == {text}:
        raise ConfigError(
            f"--guidance has no effect: the goal that it pushes away from, {printed}, is the one that is asked for. "
            "Ask for a higher --goal, or remove it."
        )
    low = Asked(text, printed, placement)
    return [replace(one, against=low) for one in asked]


def _printed_best(record: Record) -> str:
    try:
        template = template_of(record)
    except ConfigError:
        return "best"
    return template.printed(template.best, template.best_attributes)


def bare(tokenizer: Any, record: Record | None) -> Any:
    """The tokenizer with a chat template that writes no goal of its own, changed in place.

    Exported folders may write the best goal by themselves; asked for a goal here, they would write two. Such templates
    read a variable ``goal``, and are told that there is none.

    Raises:
        ConfigError: the template writes its goal whatever it is told.
    """
    if record is None or not getattr(tokenizer, "chat_template", None) or not writes(tokenizer, record["best"]):
        return tokenizer
    own = tokenizer.chat_template
    for nothing in ("false", "none", "'none'"):
        tokenizer.chat_template = "{%- set goal = " + nothing + " -%}" + own
        if not writes(tokenizer, record["best"]):
            return tokenizer
    raise ConfigError(
        "the model's chat template writes the best goal into every prompt, and can't be told not to. Use the "
        "template of "
        "the model that was trained."
    )


def writes(tokenizer: Any, text: str) -> bool:
    """Whether the chat template writes ``text`` into a prompt that doesn't have it."""
    try:
        return text.strip() in render(tokenizer, [{"role": "user", "content": "hello"}], generation_prompt=True)
    except Exception:  # templates fail with whatever jinja error their author raised
        return False
