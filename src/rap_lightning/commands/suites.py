"""``rap-lightning evaluate --suite``: benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.asked_goals import GoalOption
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.onpolicy.suites import Suite
from rap_lightning.preferences.goals import GoalTemplate


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
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Answer a benchmark at a goal, in the files that its judge's own tool reads.

    Example: rap-lightning evaluate --suite AlpacaEval --model runs/version_0/hf --output answers/

    Suites: AlpacaEval (model_outputs.json, judged where alpaca_eval is installed and a key is set), MTBench (FastChat's
    answer file, two turns), ArenaHard (its answer file), LMEval (lm-evaluation-harness,
    the goal as system instruction).
    Questions come from the Hub, or from a file of yours: --suite.questions FILE. A run that was stopped goes on.

    Args:
        suite: AlpacaEval, MTBench, ArenaHard or LMEval, or a class of yours by import path.
        model: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit; at an endpoint its name.
        output: folder for answers and results.
        name: of the model in the judge's tables; by default the folder's, with the goal.
        goal: best, none, or a number on the scale that goals state. By default the best where the model has a
            goal.json, otherwise none.
        template: how goals read; by default as in the model's goal.json.
        goal_from: a folder with a goal.json (or the file), where the model itself has none.
        engine: Transformers, VLLM or Endpoint, or a class of yours by import path; Transformers by default.
        temperature: of sampling, 0 by default; MTBench has its own.
        top_p: sample from the likeliest tokens that hold this share of the probability; 1 by default.
        max_new_tokens: longest answer, in tokens; 2048 by default.
        max_prompt_length: cut longer prompts, goal kept; by default only what the model's context has no room for.
        limit: at most this many questions (of each task).
        seed: of sampling.
        revision: of the model on the Hub: a branch, tag or commit.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.models.generation import Generation
    from rap_lightning.onpolicy.asked_goals import resolve
    from rap_lightning.onpolicy.sampled_model import Model
    from rap_lightning.onpolicy.suites import MTBench
    from rap_lightning.onpolicy.suites.base import Work

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
    if template is not None and (goal_from is not None or goal == "none"):
        raise ConfigError("--template has no effect beside --goal_from or --goal none; remove one of the two.")
    source = Model(model, revision, trust_remote_code)
    asked = resolve(goal, source.record_or(goal_from), template)
    folder = source.place.resolve().name if source.place.exists() else model.rstrip("/").rpartition("/")[2]
    own = name or re.sub(r"[^\w.-]", "-", folder + ("" if asked.printed is None else f"-goal-{asked.printed}"))
    print(f"{own}, goal: {'none' if asked.text is None else asked.text.splitlines()[-1]}")
    generation = Generation(
        2048 if max_new_tokens is None else max_new_tokens, temperature or 0.0, 1.0 if top_p is None else top_p
    )
    work = Work(
        source, own, asked, engine or Transformers(), generation, Path(output), max_prompt_length, limit, seed
    )  # fmt: skip
    return suite.run(work)
