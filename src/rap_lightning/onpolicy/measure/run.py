"""The whole evaluation: what can be measured, in which order, and the document that comes out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rap_lightning import __version__, evaluation
from rap_lightning.batches.at_goals import AtGoals
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.evaluation import Responses, figures
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.generate import Generator
from rap_lightning.onpolicy.goals import Asked, guided
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.lines import write_json, write_lines
from rap_lightning.onpolicy.measure import data
from rap_lightning.onpolicy.measure.logps import Key, Likelihoods, check_base, make_encoder
from rap_lightning.onpolicy.measure.sampled import Goal, Sampled, sample
from rap_lightning.onpolicy.model import Model
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.grid import grid, own_texts, text_at
from rap_lightning.preferences.sources import Source

if TYPE_CHECKING:
    from rap_lightning.models.generate import Generation

Part = Literal["controllability", "unlearning", "extrapolation", "discrimination", "length"]
PARTS: tuple[Part, ...] = ("controllability", "unlearning", "extrapolation", "discrimination", "length")
OF_SAMPLES: tuple[Part, ...] = ("controllability", "extrapolation", "length")
OF_LIKELIHOODS: tuple[Part, ...] = ("unlearning", "discrimination")
SHOWN_PROMPTS = 8  # whose samples stand in the document; samples.jsonl has all
WORK = "work"
"""Folder of what an evaluation is made of; a run that was stopped goes on from it."""


@dataclass
class Plan:
    """Everything that an evaluation is made of; the options of the command, which says what each means."""

    model: Model
    base: Model | None
    template: GoalTemplate | None
    sources: list[Source]
    output: Path
    parts: list[Part]
    explicit: bool
    left_out: dict[str, str]
    judge: Judge | None
    engine: Engine
    goals: list[Goal]
    sampling: Generation
    samples: int
    greedy: bool
    bins: int
    scale_points: int
    max_length: int | None
    max_prompt_length: int | None
    dtype: str
    token_budget: int
    split: str | None
    limit: int
    format: str
    columns: dict[str, str] | None
    num_proc: int | None
    seed: int
    rules: Any = field(init=False)

    def __post_init__(self) -> None:
        self.rules = data.make_rules(self.template, self.format, self.columns, self.sources)

    def asked(self) -> list[Asked]:
        """How each of the goals is asked for."""
        found = []
        for goal in self.goals:
            if goal is None or self.template is None:
                found.append(Asked(None, None))
            else:
                text, printed = text_at(self.template, goal), self.template.scale.printed(goal)
                found.append(Asked(text, printed, self.template.placement))
        if len({one.text for one in found}) < len(found):
            raise ConfigError(f"--goals {self.goals}: two of them read the same in the prompt.")
        return guided(found, self.sampling, None, self.template)


def evaluate_model(plan: Plan) -> tuple[dict[str, Any], int]:
    """Do what isn't done yet, write ``samples.jsonl`` and ``evaluation.json``; the document, and what is missing.

    Raises:
        ConfigError: options that don't go together, or files of another evaluation.
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
        document |= _of_samples(plan, sampled, evaluated, seen)
        _set_goalless_apart(document)
    if set(plan.parts) & set(OF_LIKELIHOODS):
        document |= _of_likelihoods(plan, evaluated, work)
    if sampled is not None:
        document["samples"] = _shown(sampled, evaluated.prompt_ids)
    document["seconds"] = round(time.monotonic() - started, 1)
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
    low, high = (scale.low, scale.high) if scale is not None else _range(plan, evaluated)
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
        "package": __version__,
    }


def _guidance(plan: Plan) -> dict[str, Any] | None:
    """How sampling was guided; None where it was not."""
    sampling = plan.sampling
    if not sampling.processes_logits:
        return None
    low = plan.template.low(sampling.against)[1] if sampling.guidance and plan.template is not None else None
    return {"weight": sampling.guidance, "against": low, "plausibility": sampling.plausibility}


def _range(plan: Plan, evaluated: data.Evaluated) -> tuple[float, float]:
    return data.plain_scale(plan.rules, evaluated, plan.judge.scale if plan.judge is not None else None)


# -- samples ----------------------------------------------------------------------------------------------------------


def _of_samples(plan: Plan, sampled: Sampled, evaluated: data.Evaluated, seen: data.Seen | None) -> dict[str, Any]:
    document: dict[str, Any] = {}
    drawn, picked = sampled.part(greedy=False), sampled.part(greedy=True)
    if not drawn.scores:
        raise DataError(
            "no sample has a score: "
            + ("; ".join(f"{n:,} {what}" for what, n in sampled.counts.items()) or "none drawn")
        )
    if sampled.missing or sampled.counts:
        document["trouble"] = {"without_score": sampled.missing, "counts": dict(sampled.counts)}
    if note := _foreign(drawn.scores, evaluated):
        print(f"note: {note}")
        document["note"] = note
    if "controllability" in plan.parts:
        document["controllability"] = {"sampled": evaluation.controllability(drawn, plan.goals, plan.seed)}
        if plan.greedy:
            document["controllability"]["greedy"] = evaluation.controllability(picked, plan.goals, plan.seed)
    if seen is not None:
        highest = plan.judge.scale[1] if plan.judge is not None and plan.judge.scale else np.inf
        highest = min(highest, plan.rules.goal.scale.judge_range[1])
        known = data.best_rewards(evaluated.pairs)
        part = evaluation.extrapolation(drawn, plan.goals, seen.best, known, seen.p99, float(highest), plan.seed)
        of_prompts = sum(one in seen.best for one in evaluated.prompt_ids)
        document["extrapolation"] = part | {
            "training": {"split": seen.split, "responses": seen.responses, "prompts_seen": of_prompts}
        }
    if "length" in plan.parts:
        document["length"] = evaluation.length(drawn, plan.goals, plan.seed)
    return document


BY_GOAL = {
    "controllability": (("sampled", "mean"), ("greedy", "mean")),
    "extrapolation": (("best_seen",), ("best_known",), ("p99", "share")),
    "length": (("tokens",), ("controlled",)),
}
"""Where in the document lists parallel to ``goals`` stand."""


def _set_goalless_apart(document: dict[str, Any]) -> None:
    """Move the figures without a goal out of the lists by goal, into ``without_goal``; goals are numbers then."""
    if None not in document["goals"]:
        return
    place = document["goals"].index(None)
    document["goals"] = [goal for goal in document["goals"] if goal is not None]
    apart: dict[str, Any] = {}
    for part, lists in BY_GOAL.items():
        for path in lists if part in document else ():
            holder, target = document[part], apart.setdefault(part, {})
            for key in path[:-1]:
                holder, target = holder.get(key), target.setdefault(key, {})
            if holder is not None:
                target[path[-1]] = holder[path[-1]].pop(place)
    for decoding in document.get("controllability", {}).values():
        if decoding["argmax"] is not None:
            decoding["argmax"]["shares"].pop(place)
    document["without_goal"] = apart


def _foreign(scores: Sequence[float], evaluated: data.Evaluated) -> str | None:
    low, high = evaluated.rewards
    width = (high - low) or 1.0
    outside = np.mean([not low - width <= score <= high + width for score in scores])
    if outside < 0.1:
        return None
    return (
        f"the judge's scores go from {min(scores):g} to {max(scores):g}, the data's rewards from {low:g} to {high:g}. "
        "Is it the judge of the data? Otherwise extrapolation and slope compare different units."
    )


def _shown(sampled: Sampled, prompt_ids: Sequence[str]) -> list[dict[str, Any]]:
    first = set(prompt_ids[:SHOWN_PROMPTS])
    keys = ("prompt", "goal", "response", "score", "tokens", "greedy")
    return [{key: row[key] for key in keys} for row in sampled.rows if row["prompt_id"] in first and row["sample"] == 0]


# -- likelihoods ------------------------------------------------------------------------------------------------------


def _of_likelihoods(plan: Plan, evaluated: data.Evaluated, work: Path) -> dict[str, Any]:
    template, pairs = plan.template, evaluated.pairs
    conditions: dict[str, str | None] = {"none": None}
    points = []
    if template is not None:
        conditions |= {"best": text_at(template, template.best), "worst": text_at(template, template.scale.low)}
        points = grid(template.scale, plan.scale_points) if "discrimination" in plan.parts else []
    texts = list(dict.fromkeys([*conditions.values(), *(text_at(template, goal) for goal in points if template)]))
    encoder = make_encoder(plan.model, template, plan.max_length)
    encode = AtGoals(encoder, texts, template)
    measured = Likelihoods(plan.model, pairs, encode, evaluated.report)
    tokens = measured.tokens()
    kept = [pair for pair in pairs if pair.id in tokens]
    if not kept:
        raise DataError("\n".join(["no pair can be encoded.", *evaluated.report.lines()]))
    own = {
        pair.id: own_texts(template, pair.rewards, pair.attributes) if template is not None else [None, None]
        for pair in kept
    }
    against = {(pair.id, text) for pair in kept for text in (*conditions.values(), *own[pair.id])}
    reading = {(pair.id, text_at(template, goal)) for pair in kept for goal in points if template is not None}
    wanted = (against if "unlearning" in plan.parts else set()) | reading
    policy = measured.of(plan.model, wanted, work / "logps.jsonl", plan.dtype, plan.token_budget, "log-probabilities")
    responses = Responses(
        [prompt_id_of(pair.history) for pair in kept for _ in range(2)],
        [reward for pair in kept for reward in pair.rewards],
        [count for pair in kept for count in tokens[pair.id]],
    )
    document: dict[str, Any] = {}
    if "unlearning" in plan.parts:
        assert plan.base is not None, "the part of unlearning has a base"
        base = measured.of(
            plan.base, against, work / "logps-base.jsonl", plan.dtype, plan.token_budget, "log-probabilities, base"
        )
        changes = {
            name: _changes([[(p.id, text)] * 2 for p in kept], policy, base) for name, text in conditions.items()
        }
        if template is not None:
            changes["own"] = _changes([[(p.id, text) for text in own[p.id]] for p in kept], policy, base)
        bins = evaluation.bins_of(*_range(plan, evaluated), plan.bins)
        document["unlearning"] = evaluation.unlearning(responses, changes, bins, plan.seed)
    if "discrimination" in plan.parts:
        assert template is not None, "the part of discrimination has goals"
        at = [[policy[pair.id, text_at(template, goal)] for goal in points] for pair in kept]
        logps = np.asarray([[two[side] for two in row] for row in at for side in (0, 1)])
        document["discrimination"] = evaluation.discrimination(responses, logps, points, plan.seed)
    cut = {what: tally.count for what, tally in evaluated.report.truncated.items()}
    dropped = len(pairs) - len(kept)
    if cut or dropped:
        document["encoding"] = {"max_length": encoder.max_length, "pairs_left_out": dropped, "truncated": cut}
        print("\n".join(f"  {n:,}: {what}" for what, n in {**cut, "pairs that can't be encoded": dropped}.items() if n))
    return document


def _changes(
    keys: list[list[Key]], policy: dict[Key, tuple[float, float]], base: dict[Key, tuple[float, float]]
) -> list[float]:
    """Policy minus base of each response: the first of a pair under the first key, the second under the second."""
    return [policy[two[side]][side] - base[two[side]][side] for two in keys for side in (0, 1)]


def judge_name(judge: Judge) -> str:
    """A judge in a line."""
    function = getattr(judge, "function", None)
    if callable(function):
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    settings = judge.settings()
    model = settings.get("model") or settings.get("endpoint", {}).get("model")
    name = model.get("path") if isinstance(model, dict) else model
    return f"{type(judge).__name__} {name}" if name else type(judge).__name__
