"""``rap-lightning evaluate --suite``: benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.onpolicy.requested_goals import GoalOption
from rap_lightning.onpolicy.suites import MTBench, Suite
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.template_options import TemplateOptions


def answer_suite(
    suite: Suite,
    model: str,
    output: str,
    name: str | None = None,
    goal: GoalOption | None = None,
    template: GoalTemplate | None = None,
    goal_from: str | None = None,
    engine: Engine | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    max_prompt_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Answer a benchmark at a goal, in the files that its judge's own tool reads.

    Example: rap-lightning evaluate --suite AlpacaEval --model runs/version_0/hf --output answers/

    Suites: AlpacaEval (model_outputs.json, judged if alpaca_eval is installed and a key is set), MTBench (FastChat's
    answer file, two turns), ArenaHard (its answer file), LMEval (lm-evaluation-harness, the goal as system
    instruction). Questions come from the Hub, or from a file: --suite.questions FILE. A stopped run resumes.

    Args:
        suite: AlpacaEval, MTBench, ArenaHard or LMEval, or a class by import path.
        model: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit; with an endpoint its name.
        output: folder of answers and results.
        name: the model's name in the judge's tables; by default the folder's, with the goal.
        goal: best, none, or a number on the scale that goals state. By default the best if the model has a goal.json,
            otherwise none.
        template: goal template; by default that of the model's goal.json.
        goal_from: a folder with a goal.json (or the file), if the model has none.
        engine: Transformers, VLLM or Endpoint, or a class by import path; Transformers by default.
        temperature: sampling temperature, 0 by default; MTBench has its own.
        top_p: sample from the most likely tokens that together hold this probability; 1 by default.
        max_new_tokens: longest answer, in tokens; 2048 by default.
        max_prompt_length: truncate longer prompts, goal kept; by default only to what the model's context has room for.
        limit: at most this many questions (of each task).
        seed: seed of sampling.
        chat_template: which of several named chat templates renders; by default the one called default.
        chat_template_kwargs: values of the chat template's switches, as in {enable_thinking: false}; a model that fit
            exported, or its checkpoint, has those of its training as defaults.
        revision: branch, tag or commit of the model on the Hub.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.models.generation import Generation
    from rap_lightning.onpolicy.model_source import ModelSource
    from rap_lightning.onpolicy.requested_goals import check_template_options, resolve
    from rap_lightning.onpolicy.suites.base import SuiteRun

    sampling = {
        "engine": engine, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens,
        "max_prompt_length": max_prompt_length,
    }  # fmt: skip
    if not suite.samples and (given := [option for option, value in sampling.items() if value is not None]):
        raise ConfigError(
            f"--{given[0]} has no effect with {type(suite).__name__}, which samples by itself; leave it out."
        )
    if isinstance(suite, MTBench) and temperature is not None:
        raise ConfigError("--temperature has no effect with MTBench, whose categories have their own; leave it out.")
    check_template_options(template, goal_from, [goal])
    source = ModelSource(
        model, revision, trust_remote_code, template=TemplateOptions(chat_template, chat_template_kwargs or {})
    )
    requested = resolve(goal, source.record(goal_from), template)
    suffix = "" if requested.printed is None else f"-goal-{requested.printed}"
    own = name or re.sub(r"[^\w.-]", "-", source.name + suffix)
    print(f"{own}, goal: {requested.last_line}")
    generation = Generation(
        2048 if max_new_tokens is None else max_new_tokens, temperature or 0.0, 1.0 if top_p is None else top_p
    )
    return suite.run(
        SuiteRun(
            source, own, requested, engine or Transformers(), generation, Path(output), max_prompt_length, limit, seed
        )
    )
