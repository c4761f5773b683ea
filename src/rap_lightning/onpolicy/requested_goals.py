"""Goals to request from a model: from its goal record, a template and the options ``--goal`` and ``--guidance``.

:func:`request_goals` gives the :class:`RequestedGoal` of each option. Exported chat templates may write the best goal
by themselves; :func:`without_own_goal` switches that off, so that a prompt never has two.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rap_lightning.errors import ConfigError
from rap_lightning.preferences import scales
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import GoalTemplate, Placement, StatedGoal, is_trained
from rap_lightning.preferences.rendering import render
from rap_lightning.preferences.scales import RewardScale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rap_lightning.models.generation import Generation

GoalOption: TypeAlias = float | Literal["best", "none"]
GoalRecord: TypeAlias = dict[str, Any]
"""The content of goal.json, which fit and export write beside a model."""
NAME_TEMPLATE = "Name the template: --template OverallGoal"


@dataclass(frozen=True)
class RequestedGoal:
    """A goal to request: how it is stated, its printed number (None without a goal) and its placement.

    With guidance, ``against`` is the low goal whose distribution is subtracted.
    """

    stated: StatedGoal
    printed: str | None
    placement: Placement = "auto"
    against: RequestedGoal | None = None

    @property
    def text(self) -> str | None:
        """Its text in the prompt."""
        return self.stated.text

    @property
    def last_line(self) -> str:
        """The line that states the number, for the terminal."""
        return "none" if self.stated.key is None else self.stated.key.splitlines()[-1]


NO_GOAL = RequestedGoal(StatedGoal(), None)


def read_goal_record(path: str) -> GoalRecord | None:
    """Read goal.json from the folder of a model or a run, or from the file itself; None if there is none."""
    place = Path(path).expanduser()
    file = place if place.name == "goal.json" else place / "goal.json"
    if not file.is_file():
        return None
    try:
        record: GoalRecord = json.loads(file.read_text(encoding="utf-8"))
        record["best"], record["placement"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a goal record as fit and export write it: {error}.") from error
    return record


def template_of(record: GoalRecord) -> GoalTemplate:
    """Return the goal template that a record describes.

    Only classes of this package are instantiated: a file must not decide which code runs.
    """
    path = str(record.get("template"))
    module, _, name = path.rpartition(".")
    advice = "Only its best goal can be asked for; for another, name the template with --template."
    if not path.startswith("rap_lightning."):
        raise ConfigError(f"the model's goal template is {path}, which is not of this package. {advice}")
    try:
        options: dict[str, Any] = {"scale": _scale_of(record["scale"]), "placement": record["placement"]}
        if "adapter_at" in record:
            prompt = None if record["prompt"] is None else template_of(record["prompt"])
            strength = AdapterStrength(options["scale"], record["neutral"], prompt)
            strength.adapter_at = record["adapter_at"]
            return strength
        if record.get("attributes"):
            options |= {"attributes": list(record["attributes"]), "overall": record["overall"]}
            options["attribute_scale"] = _scale_of(record["attribute_scale"])
        kind = getattr(importlib.import_module(module), name)
        if not (isinstance(kind, type) and issubclass(kind, GoalTemplate)):
            raise TypeError(f"{path} is not a goal template")
        template = kind(**options)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"the model's goal record can't be read: {error!r}. {advice}") from error
    if template.write(template.best, template.best_attributes) != record["best"]:
        raise ConfigError(f"the model's goal record was written by another version of {path}. {advice}")
    return template


def _scale_of(numbers: dict[str, Any]) -> RewardScale:
    options = dict(numbers)
    kind = getattr(scales, options.pop("class"))
    if not (isinstance(kind, type) and issubclass(kind, RewardScale)):
        raise TypeError(f"{kind} is not a reward scale")
    return kind(**options)


def goal_config(thing: GoalTemplate | RewardScale) -> dict[str, Any]:
    """Return the config of a goal template or scale: class path and arguments, fitted numbers included."""
    if isinstance(thing, RewardScale):
        arguments: dict[str, Any] = dict(thing.numbers())
    else:
        names = [name for name in inspect.signature(type(thing).__init__).parameters if name != "self"]
        if missing := [name for name in names if not hasattr(thing, name)]:
            raise ConfigError(
                f"{type(thing).__qualname__} must keep its argument {missing[0]!r} as an attribute of that name, to be "
                "written into a config."
            )
        arguments = {name: getattr(thing, name) for name in names}
    plain = {
        name: goal_config(value)
        if isinstance(value, RewardScale) else list(value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }  # fmt: skip
    return {"class_path": f"{type(thing).__module__}.{type(thing).__qualname__}", "init_args": plain}


def check_template_options(template: GoalTemplate | None, goal_from: str | None, goals: Sequence[Any]) -> None:
    """Raise ConfigError if ``--template`` meets an option that it contradicts."""
    if template is not None and goal_from is not None:
        raise ConfigError("--goal_from has no effect beside --template; remove one of the two.")
    if template is not None and set(goals) == {"none"}:
        raise ConfigError("--template has no effect with --goal none; remove one of the two.")


def request_goals(
    options: Sequence[GoalOption | None], record: GoalRecord | None, template: GoalTemplate | None,
    generation: Generation,
) -> list[RequestedGoal]:  # fmt: skip
    """Return the goal of each option, with the low goal of guidance."""
    if not options:
        raise ConfigError("--goal is an empty list. Name goals, or leave it out for the model's best.")
    goals = [resolve(option, record, template) for option in options]
    refuse_alike(goals, f"--goal {list(options)}")
    return with_low_goal(goals, generation, record, template)


def resolve(option: GoalOption | None, record: GoalRecord | None, template: GoalTemplate | None) -> RequestedGoal:
    """Return the goal of one option.

    Args:
        option: a number on the template's scale, ``best`` or ``none``; None is ``best`` if the model was trained with
            goals or a template is given, otherwise ``none``.
        record: the model's goal record.
        template: the user's template; by default that of the record.
    """
    if option == "none" or (option is None and template is None and not is_trained(record)):
        if template is None and record is not None and "adapter_at" in record:
            template = template_of(record)
        return NO_GOAL if template is None else RequestedGoal(template.unstated, None)
    if record is None and template is None:
        raise ConfigError(
            f"--goal {option}: the model's folder has no goal.json, so how goals read isn't known. {NAME_TEMPLATE}"
        )
    if template is not None and template.needs_fit:
        raise ConfigError("--template: its open numbers can't be fitted here; give them (goal.json has them).")
    if template is None:
        assert record is not None, "checked above"
        try:
            template = template_of(record)
        except ConfigError:  # another package's template: only the best goal, whose text is recorded, is available
            if option not in (None, "best"):
                raise
            return RequestedGoal(StatedGoal(record["best"]), "best", record["placement"])
    goal = template.best if option is None or option == "best" else float(option)
    if note := template.refuse_outside(goal, "--goal"):
        print(note, file=sys.stderr)
    best = template.best_attributes
    return RequestedGoal(template.state(goal, best), template.printed(goal, best), template.placement)


def refuse_alike(goals: Sequence[RequestedGoal], given: str) -> None:
    """Raise ConfigError where two goals are stated alike, or print alike in results; ``given`` is the option."""
    if min(len({goal.stated for goal in goals}), len({goal.printed for goal in goals})) < len(goals):
        raise ConfigError(f"{given}: two of them read the same.")


def with_low_goal(
    goals: Sequence[RequestedGoal], generation: Generation, record: GoalRecord | None, template: GoalTemplate | None
) -> list[RequestedGoal]:
    """Return the goals with the low goal of guidance; unchanged without guidance."""
    if generation.guidance == 0:
        return list(goals)
    if record is None and template is None:
        raise ConfigError(
            f"--guidance: the model's folder has no goal.json, so how the low goal reads isn't known. {NAME_TEMPLATE}"
        )
    if template is None and generation.against != "none":
        template = template_of(record or {})
    low, printed = (StatedGoal(), "none") if template is None else template.low(generation.against)
    against = generation.against
    if template is not None and isinstance(against, float) and (note := template.refuse_outside(against, "--against")):
        print(note, file=sys.stderr)
    placement = template.placement if template is not None else (record or {})["placement"]
    if {goal.stated for goal in goals} == {low}:
        raise ConfigError(
            f"--guidance has no effect: the goal that it pushes away from, {printed}, is the one that is asked for. "
            "Ask for a higher --goal, or remove it."
        )
    return [replace(goal, against=RequestedGoal(low, printed, placement)) for goal in goals]


def without_own_goal(tokenizer: PreTrainedTokenizerBase, record: GoalRecord | None) -> PreTrainedTokenizerBase:
    """Change the chat template in place so that it writes no goal by itself, and return the tokenizer.

    Exported templates that write the best goal read a variable ``goal``; it is set to "no goal" here.
    """
    if record is None or not tokenizer.chat_template or not template_writes(tokenizer, record["best"]):
        return tokenizer
    own = tokenizer.chat_template
    for nothing in ("false", "none", "'none'"):
        unset = "{%- set goal = " + nothing + " -%}"
        named = isinstance(own, dict)
        tokenizer.chat_template = {name: unset + text for name, text in own.items()} if named else unset + own
        if not template_writes(tokenizer, record["best"]):
            return tokenizer
    raise ConfigError(
        "the model's chat template writes the best goal into every prompt, and no variable switches that off. Use the "
        "template of the model that was trained."
    )


def template_writes(tokenizer: PreTrainedTokenizerBase, text: str | None) -> bool:
    """Return whether the chat template writes ``text`` into a prompt that doesn't contain it; None is no text."""
    try:
        return text is not None and text.strip() in render(
            tokenizer, [{"role": "user", "content": "hello"}], generation_prompt=True
        )
    except Exception:  # templates fail with whatever jinja error their author raised
        return False
