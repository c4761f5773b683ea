"""The whole evaluation: what can be measured, in which order, and the document that comes out."""

from __future__ import annotations

import time
from typing import Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError
from rap_lightning.evaluation import estimates as figures
from rap_lightning.onpolicy.evaluate import evaluation_data as data
from rap_lightning.onpolicy.evaluate.evaluation_plan import OF_LIKELIHOODS, OF_SAMPLES, Plan
from rap_lightning.onpolicy.evaluate.from_likelihoods import likelihood_parts
from rap_lightning.onpolicy.evaluate.from_samples import sample_parts, set_goalless_apart, shown
from rap_lightning.onpolicy.evaluate.merge_previous import Earlier, settings_of
from rap_lightning.onpolicy.evaluate.response_logps import check_base
from rap_lightning.onpolicy.evaluate.sampled import sample
from rap_lightning.onpolicy.jsonl_ledger import write_json, write_lines
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.response_generator import Generator

WORK = "work"
"""Folder of what an evaluation is made of; a run that was stopped goes on from it."""
FEW = 20
"""Prompts, below which bootstrapped intervals are too narrow."""


def evaluate_model(plan: Plan) -> tuple[dict[str, Any], int]:
    """Do what isn't done yet, write ``samples.jsonl`` and ``evaluation.json``; the document, and what is missing.

    Raises:
        ConfigError: options that don't go together, or files of another evaluation, whose parts would be lost.
        DataError: data that can't be read.
    """
    started = time.monotonic()
    sampled_parts = [part for part in plan.parts if part in OF_SAMPLES]
    asked = plan.asked() if sampled_parts else []
    if plan.base is not None:  # before the hours that samples may take
        check_base(plan.base, plan.model)
    evaluated = data.read_evaluated(plan.sources, plan.rules, plan.split, plan.limit, plan.seed, plan.num_proc)
    print("\n".join(evaluated.lines()), flush=True)
    seen = _seen(plan)
    earlier = Earlier(plan.output / "evaluation.json", plan.parts, settings_of(plan, evaluated))
    work = plan.output / WORK
    document = _head(plan, evaluated)
    sampled = None
    if sampled_parts:
        assert plan.judge is not None, "parts of samples have a judge"
        with Generator(plan.model, plan.engine, max_prompt_length=plan.max_prompt_length) as generator:
            sampled = sample(
                generator, evaluated.histories, plan.goals, asked, plan.sampling, plan.samples, plan.greedy,
                plan.judge, work, plan.seed,
            )  # fmt: skip
        write_lines(plan.output / "samples.jsonl", sampled.rows)
        document |= sample_parts(plan, sampled, evaluated, seen)
        set_goalless_apart(document)
    if set(plan.parts) & set(OF_LIKELIHOODS):
        document |= likelihood_parts(plan, evaluated, work)
    if sampled is not None:
        document["samples"] = shown(sampled, evaluated.prompt_ids)
    document["seconds"] = round(time.monotonic() - started, 1)
    document = earlier.with_what_stands(document)
    write_json(plan.output / "evaluation.json", document)
    return document, 0 if sampled is None else sampled.missing


def _seen(plan: Plan) -> data.Seen | None:
    """What training showed, where that is asked for and known."""
    if "extrapolation" not in plan.parts:
        return None
    seen = data.read_seen(plan.sources, plan.rules, plan.num_proc)
    if isinstance(seen, data.Seen):
        return seen
    if plan.explicit:
        raise ConfigError(f"--parts extrapolation: {seen}. Leave it out, or give data with that split.")
    plan.left_out["extrapolation"] = seen
    plan.parts.remove("extrapolation")
    print(f"left out: extrapolation: {seen}")
    return None


def _head(plan: Plan, evaluated: data.Evaluated) -> dict[str, Any]:
    scale = plan.template.scale if plan.template is not None else None
    low, high = (scale.low, scale.high) if scale is not None else plan.range(evaluated)
    return {
        "version": 1,
        "model": plan.model.path,
        "base": None if plan.base is None else plan.base.path,
        "judge": None if plan.judge is None else judge_name(plan.judge),
        "scale": {"low": low, "high": high},
        "goals": plan.goals if set(plan.parts) & set(OF_SAMPLES) else [],
        "temperature": plan.sampling.temperature,
        "top_p": plan.sampling.top_p,
        "max_new_tokens": plan.sampling.max_new_tokens,
        "guidance": _guidance(plan),
        "prompts": len(evaluated.histories),
        "pairs": len(evaluated.pairs),
        "samples_per_prompt": plan.samples,
        "seed": plan.seed,
        "source": [source.path for source in plan.sources],
        "split": evaluated.split,
        "bootstrap": {"over": "prompts", "level": figures.LEVEL, "resamples": figures.RESAMPLES, "kind": "percentile"},
        "left_out": plan.left_out,
        "warnings": _warnings(len(evaluated.histories)),
        "package": __version__,
    }


def _warnings(prompts: int) -> list[str]:
    """What to know before anything is read into the figures."""
    if prompts >= FEW:
        return []
    return [
        f"{prompts} prompt{'s are' if prompts > 1 else ' is'} too few to tell much: intervals are over prompts, and of "
        f"fewer than {FEW} they come out too narrow. Evaluate on more (--limit, --split, or more data)."
    ]


def _guidance(plan: Plan) -> dict[str, Any] | None:
    """How sampling was guided; None where it was not."""
    sampling = plan.sampling
    if not sampling.processes_logits:
        return None
    low = plan.template.low(sampling.against)[1] if sampling.guidance and plan.template is not None else None
    return {"weight": sampling.guidance, "against": low, "plausibility": sampling.plausibility}


def judge_name(judge: Judge) -> str:
    """A judge in a line."""
    function = getattr(judge, "function", None)
    if callable(function):
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    settings = judge.settings()
    model = settings.get("model") or settings.get("endpoint", {}).get("model")
    name = model.get("path") if isinstance(model, dict) else model
    return f"{type(judge).__name__} {name}" if name else type(judge).__name__
