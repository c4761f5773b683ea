"""The sequence of an evaluation: read the data, sample and judge, measure log-probabilities, compute, write."""

from __future__ import annotations

import time
from typing import Any

from rap_lightning import __version__
from rap_lightning.evaluation import bootstrap
from rap_lightning.onpolicy.evaluate.evaluation_data import EvaluatedData, read_evaluated, read_training_rewards
from rap_lightning.onpolicy.evaluate.evaluation_parts import (
    FIGURES,
    Measured,
    check_samples,
    measure_logps,
    separate_without_goal,
    shown_samples,
)
from rap_lightning.onpolicy.evaluate.evaluation_plan import FROM_LOGPS, FROM_SAMPLES, EvaluationPlan
from rap_lightning.onpolicy.evaluate.measurements import check_base, sample_and_judge
from rap_lightning.onpolicy.evaluate.merge_previous import PreviousEvaluation, settings_of
from rap_lightning.onpolicy.jsonl_ledger import write_json, write_lines
from rap_lightning.onpolicy.judges import Function, Judge

FEW_PROMPTS = 20
"""Below this number of prompts, bootstrapped intervals are too narrow."""


def evaluate_model(plan: EvaluationPlan) -> tuple[dict[str, Any], int]:
    """Run an evaluation, and write ``samples.jsonl`` and ``evaluation.json``.

    Returns:
        The document, and how many responses have no score.
    """
    started = time.monotonic()
    requested = plan.requested_goals() if plan.measures(FROM_SAMPLES) else []
    if plan.base is not None:  # before the hours that sampling may take
        check_base(plan.base, plan.model)
    evaluated = read_evaluated(plan)
    print("\n".join(evaluated.lines()), flush=True)
    previous = PreviousEvaluation(plan.output / "evaluation.json", plan.parts, settings_of(plan, evaluated))
    document, work = _head(plan, evaluated), plan.output / "work"
    measured, judged = Measured(plan, evaluated), None
    if "extrapolation" in plan.parts:
        measured.training = read_training_rewards(plan)
    if plan.measures(FROM_SAMPLES):
        judged = sample_and_judge(plan, evaluated, requested, work)
        write_lines(plan.output / "samples.jsonl", judged.rows)
        document |= check_samples(judged, evaluated)
        document["samples"] = shown_samples(judged, evaluated)
        measured.sampled, measured.greedy = judged.scored(greedy=False), judged.scored(greedy=True)
    if plan.measures(FROM_LOGPS):
        measured.logps, encoding = measure_logps(plan, evaluated, work)
        document |= encoding
    document |= {part: figures(measured) for part, figures in FIGURES.items() if part in plan.parts}
    if judged is not None:
        separate_without_goal(document)
    document["seconds"] = round(time.monotonic() - started, 1)
    document = previous.merged_into(document)
    write_json(plan.output / "evaluation.json", document)
    return document, 0 if judged is None else judged.missing


def _head(plan: EvaluationPlan, evaluated: EvaluatedData) -> dict[str, Any]:
    scale = plan.template.scale if plan.template is not None else None
    low, high = (scale.low, scale.high) if scale is not None else plan.reward_range(evaluated.rewards)
    return {
        "version": 1,
        "model": plan.model.path,
        "base": None if plan.base is None else plan.base.path,
        "judge": None if plan.judge is None else judge_name(plan.judge),
        "scale": {"low": low, "high": high},
        "goals": plan.goals if plan.measures(FROM_SAMPLES) else [],
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
        "bootstrap": {
            "over": "prompts", "level": bootstrap.LEVEL, "resamples": bootstrap.RESAMPLES, "kind": "percentile"
        },
        "left_out": plan.left_out,
        "warnings": _warnings(len(evaluated.histories)),
        "package": __version__,
    }  # fmt: skip


def _warnings(prompts: int) -> list[str]:
    if prompts >= FEW_PROMPTS:
        return []
    return [
        f"{prompts} prompt{'s are' if prompts > 1 else ' is'} too few to tell much: intervals are over prompts, and of "
        f"fewer than {FEW_PROMPTS} they come out too narrow. Evaluate on more (--limit, --split, or more data)."
    ]


def _guidance(plan: EvaluationPlan) -> dict[str, Any] | None:
    sampling = plan.sampling
    if not sampling.processes_logits:
        return None
    low = plan.template.low(sampling.against)[1] if sampling.guidance and plan.template is not None else None
    return {"weight": sampling.guidance, "against": low, "plausibility": sampling.plausibility}


def judge_name(judge: Judge) -> str:
    """Return a judge's name for tables: its class and model, or its function."""
    if isinstance(judge, Function):
        return f"{judge.function.__module__}.{judge.function.__qualname__}"
    settings = judge.settings()
    model = settings.get("model") or settings.get("endpoint", {}).get("model")
    name = model.get("path") if isinstance(model, dict) else model
    return f"{type(judge).__name__} {name}" if name else type(judge).__name__
