"""``rap-lightning evaluate``: does the goal steer, and what did training do to the data's responses?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from rap_lightning.cli.config_files import configs_named, content_of
from rap_lightning.commands import suites
from rap_lightning.commands.options import run as run_function
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.evaluate.evaluation_plan import Part, make_plan
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.sources import Source


def run(args: list[str]) -> int:
    """Run one of the command's two functions: a benchmark with ``--suite``, the goal-conditioned evaluation without."""
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
    thinking: Literal["keep", "strip", "empty"] | None = None,
    num_proc: int | None = None,
    seed: int = 0,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Measure what goals do in a model: figures with 95% intervals over prompts, on scored data.

    Example: rap-lightning evaluate --model runs/version_0/hf --source my-pairs/ --judge RewardModel --judge.model RM
    With a Python function as judge: --judge Function --judge.function my_judge.score
    With a language model as judge: --judge LLMJudge --judge.url http://localhost:8000/v1 --judge.model NAME
    Benchmarks instead (AlpacaEval, MTBench, ArenaHard, LMEval): rap-lightning evaluate --suite AlpacaEval --help

    Parts:
      controllability  mean score at each goal, Spearman, slope, and the goal with the highest score; also greedy
      unlearning       change of log-probability of the data's responses against the base, by reward, role and goal
      extrapolation    share of samples that reach the best response in training, and the data's 99th percentile
      discrimination   scores read off the policy (the goal under which it would write a response) against the judge's
      length           tokens at each goal, and the scores as they would be at one length
    By default all that can be measured; the others are listed with what they need. Without a judge only the parts from
    log-probabilities remain.

    A stopped run resumes when started again with the same options. It writes evaluation.json and samples.jsonl; the
    exit code is 1 if responses have no score.

    Args:
        model: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit; with an endpoint its name.
        source: scored data in any format that fit reads, or a list of sources.
        judge: RewardModel, LLMJudge or Function, or a class by import path. Preferably the judge of the data.
        output: folder of all files; by default RUN/evaluation for a model in a run's folder.
        base: the model that training began with; by default the one that the run, checkpoint or adapter names.
        parts: which of the above.
        goals: numbers on the scale that goals state, or none for no goal in the prompt; by default seven from its
            lowest to its highest, and none alone for a model without goals (both for a model trained without, or with
            --template).
        template: goal template, if the model's folder has no goal.json: OverallGoal
        goal_from: a folder with a goal.json (or the file), if the model has none.
        split: split of the prompts; by default the first of validation, valid, val, test_prefs and test, or the only
            one. Prompts of the training split show what training did to what it saw.
        limit: at most this many prompts, drawn with the seed.
        samples: responses for each prompt at each goal; 4 by default.
        greedy: also the greedy response of each prompt at each goal; true by default.
        engine: Transformers, VLLM or Endpoint, or a class by import path; Transformers by default.
        temperature: sampling temperature; 1 by default.
        top_p: sample from the most likely tokens that together hold this probability; 1 by default.
        max_new_tokens: longest response, in tokens; by default 512, or half of the model's context if that is less.
        guidance: guidance of sampling, as for generate: how far log-probabilities at each goal are pushed away from
            those at a low goal; by default not at all. It doesn't apply to log-probabilities of the data's responses.
        against: the low goal, a number on the scale, or none for the prompt without a goal; by default the lowest.
        plausibility: leave out tokens whose probability at the goal is below this share of the most likely one's; by
            default none is left out. Without guidance it is min-p, and greedy responses stay the same.
        max_prompt_length: truncate longer prompts, goal kept; by default only to what the model's context has room for.
        bins: reward bins of equal width, for unlearning; 3 by default.
        scale_points: goals that discrimination reads scores from, evenly over the scale; 19 by default.
        max_length: tokens of prompt and response together, for log-probabilities; by default 1024, or the model's
            context if that is less.
        dtype: dtype of the weights, for log-probabilities; float32 by default.
        token_budget: tokens in one forward pass, for log-probabilities; 8192 by default. Affects memory and speed only.
        format: format of the rows, as for fit; this and the next three are by default those in the config.yaml of the
            model's run, otherwise fit's defaults. auto finds the format by the columns.
        columns: new names for columns, {theirs: ours}; {} renames none, whatever the run did.
        outside_scale: scores outside the goal's scale: error, drop such pairs or responses, or clip them.
        bad_rows: rows that can't be used: drop or error.
        thinking: thoughts in the data's responses: keep, strip, or leave their tags empty; by default as in the run.
        num_proc: processes that read the data.
        seed: seed of the choice of prompts, of sampling and of the intervals.
        chat_template: which of several named chat templates renders; by default the one called default.
        chat_template_kwargs: values of the chat template's switches, as in {enable_thinking: false}; a model that fit
            exported, or its checkpoint, has those of its training as defaults.
        revision: branch, tag or commit of the model on the Hub.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    plan = make_plan(**{name: value for name, value in locals().items() if value is not None})
    from rap_lightning.onpolicy.evaluate.run_evaluation import evaluate_model
    from rap_lightning.onpolicy.evaluate.terminal_tables import show

    try:
        document, missing = evaluate_model(plan)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; the same command resumes with what is in {plan.output}") from stop
    show(document)
    print(f"{plan.output / 'evaluation.json'}: {document['seconds']:g} s")
    if missing:
        for what, count in document["trouble"]["counts"].items():
            print(f"  {count:,}: {what}")
        print(f"{missing:,} responses have no score; the same command retries them")
    return 1 if missing else 0


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _names(args: list[str], option: str) -> bool:
    """Return whether a command line, or a config that it names, gives an option."""
    flag = f"--{option}"
    if any(arg == flag or arg.startswith((f"{flag}=", f"{flag}.")) for arg in args):
        return True
    return any(option in content_of(path) for path in configs_named(args))
