"""``rap-lightning evaluate``: does the goal steer, and what did training do to the data's responses?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rap_lightning.cli.config_files import configs_named, content_of
from rap_lightning.commands import suites
from rap_lightning.commands.options import run as run_function
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.asked_goals import template_of
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.onpolicy.evaluate.base_model_record import recorded_base, run_of
from rap_lightning.onpolicy.evaluate.evaluation_plan import OF_LIKELIHOODS, OF_SAMPLES, PARTS, Part, Plan
from rap_lightning.onpolicy.evaluate.reading import Reading, reading_of
from rap_lightning.onpolicy.evaluate.run import evaluate_model
from rap_lightning.onpolicy.evaluate.terminal_tables import show
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.preferences.goals import GoalTemplate, is_trained
from rap_lightning.preferences.sources import Source, as_sources

GOALS = 7
"""Asked for by default, evenly over the scale."""
LONGEST = 512
"""Tokens of a response, by default."""


def run(args: list[str]) -> int:
    """One verb for two things: a benchmark with ``--suite``, the goal-conditioned evaluation without."""
    with_suite = _names(args, "suite")
    function: Callable[..., int] = suites.answer_suite if with_suite else evaluate
    other = evaluate if with_suite else suites.answer_suite
    for name in _parameters(other) - _parameters(function):
        if name != "suite" and _names(args, name):
            raise ConfigError(
                f"--{name} has no effect with --suite, which answers a benchmark; remove one of the two."
                if with_suite
                else f"--{name} is of benchmarks and has no effect without --suite; remove it, or name a suite."
            )
    return int(run_function(function, args, "evaluate"))


def evaluate(
    model: str,
    source: str | list[Source],
    judge: Judge | None = None,
    output: str | None = None,
    base: str | None = None,
    parts: list[Part] | None = None,
    goals: list[float | Literal["none"]] | None = None,
    template: GoalTemplate | None = None,
    goal_from: str | None = None,
    split: str | None = None,
    limit: int = 100,
    samples: int | None = None,
    greedy: bool | None = None,
    engine: Engine | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    guidance: float | None = None,
    against: float | Literal["none"] | None = None,
    plausibility: float | None = None,
    max_prompt_length: int | None = None,
    bins: int | None = None,
    scale_points: int | None = None,
    max_length: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    token_budget: int | None = None,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    outside_scale: Literal["error", "drop", "clip"] | None = None,
    bad_rows: Literal["drop", "error"] | None = None,
    num_proc: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Measure what goals do in a model: figures with 95% intervals over prompts, on scored data.

    Example: rap-lightning evaluate --model runs/version_0/hf --source my-pairs/ --judge RewardModel --judge.model RM
    A function of yours judges: --judge Function --judge.function my_judge.score
    A language model judges: --judge LLMJudge --judge.url http://localhost:8000/v1 --judge.model NAME
    Benchmarks instead (AlpacaEval, MTBench, ArenaHard, LMEval): rap-lightning evaluate --suite AlpacaEval --help

    Parts:
      controllability  mean score at each goal, Spearman, slope, and where the curve is highest; greedy beside it
      unlearning       change of log-probability of the data's responses against the base, by reward, role and goal
      extrapolation    share of samples that reach the best response in training, and the data's 99th percentile
      discrimination   scores read off the policy (the goal under which it would write a response) against the judge's
      length           tokens at each goal, and the scores as they would be at one length
    By default all that can be measured; what can't be is named, with what it needs. Without a judge those of
    log-probabilities are left.

    A run that was stopped goes on when started again in the same way. It writes evaluation.json and samples.jsonl, and
    ends with 1 where responses are left without a score.

    Args:
        model: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit; at an endpoint its name.
        source: scored data in any format that fit reads, or a list of sources.
        judge: RewardModel, LLMJudge or Function, or a class of yours by import path. Best the judge of the data.
        output: folder for everything; by default RUN/evaluation, where the model lies in a run's folder.
        base: the model that training began with; by default the one that the run, checkpoint or adapter names.
        parts: which of the above.
        goals: numbers on the scale that goals state, or none for no goal in the prompt; by default seven from its
            lowest to its highest, and none alone where the model knows no goals (both where it was trained without, or
            with --template).
        template: how goals read, where the model's folder has no goal.json; OverallGoal say.
        goal_from: a folder with a goal.json (or the file), where the model itself has none.
        split: of the prompts; by default the first there is of validation, valid, val, test_prefs and test, or the
            only one. Prompts of the training split show what training did to what it saw.
        limit: at most this many prompts, drawn by the seed.
        samples: responses for each prompt at each goal; 4 by default.
        greedy: also the greedy response of each prompt at each goal; true by default.
        engine: Transformers, VLLM or Endpoint, or a class of yours by import path; Transformers by default.
        temperature: of sampling; 1 by default.
        top_p: sample from the likeliest tokens that hold this share of the probability; 1 by default.
        max_new_tokens: longest response, in tokens; by default 512, or half of the model's context where that is
            less.
        guidance: of sampling, as generate has it: how far log-probabilities at each goal are pushed away from those at
            a low goal; by default not at all. Log-probabilities of the data's responses have no guidance.
        against: the low goal, a number on the scale, or none for the prompt without a goal; by default the lowest.
        plausibility: leave out tokens whose probability at the goal is below this share of the likeliest one's; by
            default none is left out. Without guidance it is min-p, and greedy responses are as they were.
        max_prompt_length: cut longer prompts, goal kept; by default only what the model's context has no room for.
        bins: of rewards, of equal width, for unlearning; 3 by default.
        scale_points: goals that discrimination reads scores from, evenly over the scale; 19 by default.
        max_length: tokens of prompt and response together, for log-probabilities; by default 1024, or
            the model's context where that is less.
        dtype: of the weights, for log-probabilities; float32 by default.
        token_budget: tokens in one forward pass, for log-probabilities; 8192 by default. Memory and speed only.
        format: of the rows, as for fit; this and the next three by default as the run's config.yaml says, where the
            model lies in a run's folder, and otherwise as fit has them by default. auto finds it by the columns.
        columns: new names for columns, {theirs: ours}; {} renames none, whatever the run did.
        outside_scale: scores outside the goal's scale: error, drop such pairs or responses, or clip them.
        bad_rows: rows that can't be used: drop or error.
        num_proc: processes that share the reading.
        seed: of the prompts' choice, of sampling and of the intervals.
        revision: of the model on the Hub: a branch, tag or commit.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.models.generation import Generation

    given = {name: value for name, value in locals().items() if name in _parameters(evaluate) and value is not None}
    least = {"limit": 1, "samples": 1, "bins": 1, "scale_points": 2, "token_budget": 1, "num_proc": 1}
    for name, lowest in least.items():
        if name in given and given[name] < lowest:
            raise ConfigError(f"--{name} must be at least {lowest}, found {given[name]}")
    one = Model(model, revision, trust_remote_code)
    known = _template(one, template, goal_from)
    begun = recorded_base(one) if base is None else Model(base, None, trust_remote_code, "--base")
    wanted, left_out, found_base = _parts(parts, judge, known, begun, engine, one)
    _refuse_idle(given, wanted)
    if temperature == 0:
        raise ConfigError("--temperature 0 would sample one response again and again; greedy ones are shown beside.")
    for part, why in left_out.items():
        print(f"left out: {part}: {why}")
    reading, taken = reading_of(one, {n: given[n] for n in vars(Reading()) if n in given}, known)
    if taken:
        print(taken)
    plan = Plan(
        model=one, base=found_base, template=known, sources=as_sources(source), output=_output(output, one),
        parts=wanted, explicit=parts is not None, left_out=left_out, judge=judge, engine=engine or Transformers(),
        goals=_goals(goals, known, own=template is None and goal_from is None and is_trained(one.record())),
        sampling=Generation(
            _longest(max_new_tokens, engine, one, wanted), 1.0 if temperature is None else temperature,
            1.0 if top_p is None else top_p, guidance or 0.0, against, plausibility,
        ),
        samples=4 if samples is None else samples, greedy=greedy is not False, bins=3 if bins is None else bins,
        scale_points=19 if scale_points is None else scale_points,
        max_length=max_length, max_prompt_length=max_prompt_length,
        dtype=dtype or "float32", token_budget=8192 if token_budget is None else token_budget, split=split, limit=limit,
        reading=reading, num_proc=num_proc, seed=seed,
    )  # fmt: skip
    try:
        document, missing = evaluate_model(plan)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; the same command goes on with what is in {plan.output}") from stop
    show(document)
    print(f"{plan.output / 'evaluation.json'}: {document['seconds']:g} s")
    if missing:
        for what, count in document["trouble"]["counts"].items():
            print(f"  {count:,}: {what}")
        print(f"{missing:,} responses have no score; the same command asks for them again")
    return 1 if missing else 0


def _template(model: Model, template: GoalTemplate | None, goal_from: str | None) -> GoalTemplate | None:
    if template is not None:
        if goal_from is not None:
            raise ConfigError("--goal_from has no effect beside --template; remove one of the two.")
        return template
    record = model.record_or(goal_from)
    return None if record is None else template_of(record)


def _goals(
    goals: list[float | Literal["none"]] | None, template: GoalTemplate | None, *, own: bool
) -> list[float | None]:
    """The goals to ask for, none first, then from low to high."""
    if goals is None:
        if template is None:
            return [None]
        evenly: list[float | None] = list(template.scale.grid(GOALS))
        return evenly if own else [None, *evenly]
    numbers = sorted({float(goal) for goal in goals if goal != "none"})
    if numbers and template is None:
        raise ConfigError(
            f"--goals {numbers[0]:g}: the model's folder has no goal.json, so how goals read isn't known. Name the "
            "template: --template OverallGoal"
        )
    if template is not None:
        low, high = template.scale.low, template.scale.high
        if outside := [goal for goal in numbers if not low <= goal <= high]:
            raise ConfigError(f"--goals must lie on the scale of {low:g} to {high:g}, found {outside[0]:g}")
    found: list[float | None] = [None] if "none" in goals else []
    return found + list(numbers)


def _parts(
    asked: list[Part] | None, judge: Judge | None, template: GoalTemplate | None, base: Model | str,
    engine: Engine | None, model: Model,
) -> tuple[list[Part], dict[str, str], Model | None]:  # fmt: skip
    """What is measured, what is left out and why, and the base where it is needed."""
    reasons: dict[str, str] = {}
    if judge is None:
        reasons |= dict.fromkeys(OF_SAMPLES, "nobody judges the samples. Name a --judge")
    if isinstance(base, str):
        reasons["unlearning"] = base
    if template is None:
        reasons["discrimination"] = "the model knows no goals (no goal.json). Name how they read with --template"
    if engine is not None and not engine.reads_ids and not model.place.exists():
        where = f"{type(engine).__name__} gives no log-probabilities of texts. Give the model's folder as --model"
        reasons |= dict.fromkeys(OF_LIKELIHOODS, where)
    if asked is not None:
        if not asked:
            raise ConfigError("--parts: name at least one, or leave it out.")
        if refused := [part for part in asked if part in reasons]:
            raise ConfigError(f"--parts {refused[0]}: {reasons[refused[0]]}.")
    wanted: list[Part] = [part for part in PARTS if part in (asked or PARTS) and part not in reasons]
    left_out = {part: why for part, why in reasons.items() if asked is None}
    if not wanted:
        raise ConfigError("nothing can be measured. " + " ".join(f"{part}: {why}." for part, why in left_out.items()))
    needed = base if "unlearning" in wanted and isinstance(base, Model) else None
    return wanted, left_out, needed


OPTIONS_OF: dict[tuple[Part, ...], tuple[str, ...]] = {
    OF_SAMPLES: (
        "judge", "goals", "samples", "greedy", "engine", "temperature", "top_p", "max_new_tokens", "guidance",
        "against", "plausibility", "max_prompt_length",
    ),
    OF_LIKELIHOODS: ("max_length", "dtype", "token_budget"),
    ("unlearning",): ("base", "bins"),
    ("discrimination",): ("scale_points",),
}  # fmt: skip


def _refuse_idle(given: dict[str, Any], wanted: list[Part]) -> None:
    for parts, options in OPTIONS_OF.items():
        if set(parts) & set(wanted):
            continue
        if idle := [option for option in options if option in given]:
            raise ConfigError(
                f"--{idle[0]} has no effect without the part{'s' if len(parts) > 1 else ''} {', '.join(parts)}; remove "
                "it, or give what they need."
            )


def _longest(asked: int | None, engine: Engine | None, model: Model, wanted: list[Part]) -> int:
    """Tokens of the longest response: by default half of the context may be prompt."""
    if asked is not None or not set(wanted) & set(OF_SAMPLES):
        return LONGEST if asked is None else asked
    engine = engine or Transformers()
    return min(LONGEST, engine.context(model) // 2) if engine.reads_ids else LONGEST


def _output(output: str | None, model: Model) -> Path:
    if output is not None:
        return Path(output)
    run = run_of(model)
    if run is None:
        here = "" if model.place.exists() else f" {model.path} is not here: is it a Hub id?"
        raise ConfigError(f"--output: name a folder; only a model within a run's folder has one of its own.{here}")
    return run / "evaluation"


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _names(args: list[str], option: str) -> bool:
    """Whether a command line, or a config that it names, gives an option."""
    flag = f"--{option}"
    if any(arg == flag or arg.startswith((f"{flag}=", f"{flag}.")) for arg in args):
        return True
    return any(option in content_of(path) for path in configs_named(args))
