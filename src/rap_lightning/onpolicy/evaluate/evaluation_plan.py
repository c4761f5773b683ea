"""The options of an evaluation: defaults, which parts can be measured, and which options have no effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.onpolicy.evaluate.recorded_run import READ_OPTIONS, read_options, recorded_base, run_of
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.requested_goals import (
    NAME_TEMPLATE,
    NO_GOAL,
    RequestedGoal,
    check_template_options,
    refuse_alike,
    template_of,
    with_low_goal,
)
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal, is_trained
from rap_lightning.preferences.read_pairs import fit_scale
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import LinearScale
from rap_lightning.preferences.sources import Source, as_sources, having, splits_among
from rap_lightning.preferences.template_options import TemplateOptions

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation

Part = Literal["controllability", "unlearning", "extrapolation", "discrimination", "length"]
FROM_SAMPLES: tuple[Part, ...] = ("controllability", "extrapolation", "length")
FROM_LOGPS: tuple[Part, ...] = ("unlearning", "discrimination")
PARTS: tuple[Part, ...] = ("controllability", "unlearning", "extrapolation", "discrimination", "length")
OPTIONS_OF: dict[tuple[Part, ...], tuple[str, ...]] = {
    FROM_SAMPLES: (
        "judge", "goals", "samples", "greedy", "engine", "temperature", "top_p", "max_new_tokens", "guidance",
        "against", "plausibility", "max_prompt_length",
    ),
    FROM_LOGPS: ("max_length", "dtype", "token_budget"),
    ("unlearning",): ("base", "bins"),
    ("discrimination",): ("scale_points",),
}  # fmt: skip
"""Options that only these parts use."""
AT_LEAST = {"limit": 1, "samples": 1, "bins": 1, "scale_points": 2, "token_budget": 1, "num_proc": 1}
GOALS = 7
"""Goals by default, evenly over the scale."""
MAX_NEW_TOKENS = 512
GoalOrNone = float | None
TRAIN = "train"


@dataclass
class EvaluationPlan:
    """Everything that an evaluation depends on; the docstring of the command describes each option."""

    model: ModelSource
    base: ModelSource | None
    template: GoalTemplate | None
    sources: list[Source]
    output: Path
    parts: list[Part]
    left_out: dict[str, str]
    """Why the other parts are left out."""
    judge: Judge | None
    engine: Engine
    goals: list[GoalOrNone]
    sampling: Generation
    read: dict[str, Any]
    samples: int = 4
    greedy: bool = True
    bins: int = 3
    scale_points: int = 19
    max_length: int | None = None
    max_prompt_length: int | None = None
    dtype: str = "float32"
    token_budget: int = 8192
    split: str | None = None
    limit: int = 100
    num_proc: int | None = None
    seed: int = 0
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        self.rules = make_rules(self.template, self.read, self.sources)

    def measures(self, parts: tuple[Part, ...]) -> bool:
        """Return whether any of these parts is measured."""
        return not set(parts).isdisjoint(self.parts)

    def requested_goals(self) -> list[RequestedGoal]:
        """Return the goals with their texts, in the order of ``goals``."""
        found = []
        for goal in self.goals:
            if self.template is None:
                found.append(NO_GOAL)
            elif goal is None:
                found.append(RequestedGoal(self.template.unstated, None))
            else:
                printed = self.template.scale.printed(goal)
                found.append(RequestedGoal(self.template.state_at(goal), printed, self.template.placement))
        refuse_alike(found, f"--goals {self.goals}")
        return with_low_goal(found, self.sampling, None, self.template)

    @property
    def highest_score(self) -> float:
        """The highest score that the judge can give on the goal's scale; infinity if it has no limit."""
        highest = self.judge.scale[1] if self.judge is not None and self.judge.scale is not None else np.inf
        return float(min(highest, self.rules.goal.scale.judge_range[1] if self.rules.goal is not None else np.inf))

    def reward_range(self, in_data: tuple[float, float]) -> tuple[float, float]:
        """Return the range of the goal's scale, otherwise of the judge, otherwise of the data's rewards."""
        low, high = self.rules.goal.scale.judge_range if self.rules.goal is not None else (-np.inf, np.inf)
        if np.isfinite(low) and np.isfinite(high):
            return float(low), float(high)
        if self.judge is not None and self.judge.scale is not None:
            return float(self.judge.scale[0]), float(self.judge.scale[1])
        return in_data


def make_rules(template: GoalTemplate | None, options: dict[str, Any], sources: Sequence[Source]) -> Rules:
    """Return the rules of reading: scored pairs, without those of equal reward.

    Without a template, rewards of any range are used as they are.
    """
    goal = template or OverallGoal(LinearScale(decimals=6))
    rules = Rules(goal, Relabelling("none"), **options)
    if template is not None and goal.needs_fit:
        raise ConfigError("--template: its open numbers are those of the training run; give them (goal.json has them).")
    if template is not None:
        template.check_differ()
    if goal.scale.needs_fit:
        splits = splits_among(sources)
        split = TRAIN if TRAIN in splits else splits[0]
        fit_scale(rules, having(sources, split), split)
    return rules


def make_plan(
    model: str, source: str | list[Source], *, judge: Judge | None = None, output: str | None = None,
    base: str | None = None, parts: list[Part] | None = None, goals: list[float | Literal["none"]] | None = None,
    template: GoalTemplate | None = None, goal_from: str | None = None, engine: Engine | None = None,
    revision: str | None = None, trust_remote_code: bool = False, chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None, **given: Any,
) -> EvaluationPlan:  # fmt: skip
    """Return the plan for the options of the command that the user gave."""
    from rap_lightning.models.generation import Generation

    for name, lowest in AT_LEAST.items():
        if name in given and given[name] < lowest:
            raise ConfigError(f"--{name} must be at least {lowest}, found {given[name]}")
    check_template_options(template, goal_from, ())
    asked = TemplateOptions(chat_template, chat_template_kwargs or {})
    one = ModelSource(model, revision, trust_remote_code, template=asked)
    known = template
    if template is None and (record := one.record(goal_from)) is not None:
        known = template_of(record)
    started_from = recorded_base(one) if base is None else ModelSource(base, None, trust_remote_code, "--base")
    sources = as_sources(source)
    wanted, left_out = _choose_parts(parts, _obstacles(judge, known, started_from, engine, one, sources))
    also = {"judge": judge, "goals": goals, "engine": engine, "base": base}
    _refuse_options_without_effect({*given, *(name for name, value in also.items() if value is not None)}, wanted)
    if given.get("temperature") == 0:
        raise ConfigError("--temperature 0 would sample one response again and again; greedy ones are shown beside.")
    for part, why in left_out.items():
        print(f"left out: {part}: {why}")
    read, taken = read_options(one, {name: given.pop(name) for name in READ_OPTIONS if name in given}, known)
    if taken:
        print(taken)
    engine = engine or Transformers()
    if "max_new_tokens" not in given:  # by default half of the context is left for the prompt
        context = engine.context(one) if engine.reads_ids and set(wanted) & set(FROM_SAMPLES) else 2 * MAX_NEW_TOKENS
        given["max_new_tokens"] = min(MAX_NEW_TOKENS, context // 2)
    sampling = {field.name for field in fields(Generation)} & given.keys()
    own_goals = template is None and goal_from is None and is_trained(one.record())
    compared = started_from if "unlearning" in wanted and isinstance(started_from, ModelSource) else None
    return EvaluationPlan(
        model=one, base=compared, template=known, sources=sources, output=_output(output, one), parts=wanted,
        left_out=left_out, judge=judge, engine=engine, read=read,
        goals=_goals(goals, known, own=own_goals),
        sampling=Generation(**{name: given.pop(name) for name in sampling}), **given,
    )  # fmt: skip


def _goals(
    goals: list[float | Literal["none"]] | None, template: GoalTemplate | None, *, own: bool
) -> list[GoalOrNone]:
    """Return the goals to request: none first, then from low to high."""
    if goals is None:
        evenly: list[GoalOrNone] = [] if template is None else [*template.scale.grid(GOALS)]
        return evenly if own else [None, *evenly]
    if not goals:
        raise ConfigError("--goals is an empty list. Name goals, or leave it out for seven over the scale.")
    numbers = sorted({float(goal) for goal in goals if goal != "none"})
    if numbers and template is None:
        raise ConfigError(
            f"--goals {numbers[0]:g}: the model's folder has no goal.json, so how goals read isn't known. "
            f"{NAME_TEMPLATE}"
        )
    if template is not None:
        for note in filter(None, (template.refuse_outside(goal, "--goals") for goal in numbers)):
            print(note)
    return [*([None] if "none" in goals else []), *numbers]


def _obstacles(
    judge: Judge | None, template: GoalTemplate | None, base: ModelSource | str, engine: Engine | None,
    model: ModelSource, sources: list[Source],
) -> dict[Part, str]:  # fmt: skip
    """Return why parts can't be measured."""
    reasons: dict[Part, str] = {}
    if judge is None:
        reasons |= dict.fromkeys(FROM_SAMPLES, "samples need a judge. Name a --judge")
    if isinstance(base, str):
        reasons["unlearning"] = base
    if template is None:
        reasons["discrimination"] = "the model knows no goals (no goal.json). Name how they read with --template"
    if engine is not None and not engine.reads_ids and not model.place.exists():
        where = f"{type(engine).__name__} gives no log-probabilities of texts. Give the model's folder as --model"
        reasons |= dict.fromkeys(FROM_LOGPS, where)
    if isinstance(template, AdapterStrength) and not model.adapts:
        where = "goals are the strength of an adapter, and the model has none. Give the adapter's folder as --model"
        reasons |= dict.fromkeys(FROM_LOGPS, where)
    if TRAIN not in (splits := splits_among(sources)):
        missing = f"the data have no split named {TRAIN}, only {', '.join(splits)}. Give data with that split"
        reasons.setdefault("extrapolation", missing)
    return reasons


def _choose_parts(requested: list[Part] | None, reasons: dict[Part, str]) -> tuple[list[Part], dict[str, str]]:
    """Return the parts to measure, and why others are left out."""
    if requested is not None:
        if not requested:
            raise ConfigError("--parts: name at least one, or leave it out.")
        if refused := [part for part in requested if part in reasons]:
            raise ConfigError(f"--parts {refused[0]}: {reasons[refused[0]]}.")
        return [part for part in PARTS if part in requested], {}
    wanted = [part for part in PARTS if part not in reasons]
    if not wanted:
        raise ConfigError("nothing can be measured. " + " ".join(f"{part}: {why}." for part, why in reasons.items()))
    return wanted, dict[str, str](reasons.items())


def _refuse_options_without_effect(given: set[str], wanted: list[Part]) -> None:
    for parts, options in OPTIONS_OF.items():
        if set(parts) & set(wanted):
            continue
        if idle := [option for option in options if option in given]:
            raise ConfigError(
                f"--{idle[0]} has no effect without the part{'s' if len(parts) > 1 else ''} {', '.join(parts)}; remove "
                "it, or give what they need."
            )


def _output(output: str | None, model: ModelSource) -> Path:
    if output is not None:
        return Path(output)
    run = run_of(model)
    if run is None:
        here = "" if model.place.exists() else f" {model.path} is not here: is it a Hub id?"
        raise ConfigError(f"--output: name a folder; only a model within a run's folder has one of its own.{here}")
    return run / "evaluation"
