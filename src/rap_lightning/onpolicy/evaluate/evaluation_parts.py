"""The parts of evaluation.json: one function each, one line in :data:`FIGURES`, one column per list by goal.

To add a figure: compute it in :mod:`rap_lightning.evaluation`, return it from a function here, name that in FIGURES
(a new part also in ``PARTS`` of evaluation_plan), and add a :class:`GoalColumn` if it has a number for each goal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rap_lightning import evaluation
from rap_lightning.errors import DataError
from rap_lightning.evaluation import Responses, Samples
from rap_lightning.onpolicy.evaluate.evaluation_data import EvaluatedData, TrainingRewards, add_best_rewards, prompt_of
from rap_lightning.onpolicy.evaluate.evaluation_plan import TRAIN, EvaluationPlan, Part
from rap_lightning.onpolicy.evaluate.measurements import GoalLogps, JudgedSamples, Key
from rap_lightning.preferences.goals import StatedGoal
from rap_lightning.preferences.pairs import Pair

PairLogpsByKey = Mapping[Key, tuple[float, float]]
SHOWN_PROMPTS = 8
"""Prompts whose samples are copied into the document; samples.jsonl has all."""


class GoalColumn(NamedTuple):
    """A list parallel to ``goals`` in the document, and the column that shows it on the terminal.

    ``title`` may refer to keys of the document.
    """

    path: tuple[str, ...]
    title: str
    decimals: int = 2

    def of(self, document: Mapping[str, Any]) -> Any:
        """Return the list, or the single figure of ``without_goal``; None if the document lacks it."""
        found: Any = document
        for key in self.path:
            found = None if found is None else found.get(key)
        return found


GOAL_COLUMNS = (
    GoalColumn(("controllability", "sampled", "mean"), "score at temperature {temperature:g}"),
    GoalColumn(("controllability", "greedy", "mean"), "greedy"),
    GoalColumn(("length", "controlled"), "score at one length"),
    GoalColumn(("length", "tokens"), "tokens", 1),
    GoalColumn(("extrapolation", "best_seen"), "reach best seen"),
    GoalColumn(("extrapolation", "best_known"), "reach best known"),
    GoalColumn(("extrapolation", "p99", "share"), "above {extrapolation[p99][score]:.3g} (p99)"),
)


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities in nats, by pair id and goal text, of winner and loser of the pairs that can be encoded."""

    pairs: list[Pair]
    responses: Responses
    goals: list[float]
    """Goals of discrimination."""
    policy: PairLogpsByKey
    base: PairLogpsByKey


@dataclass
class Measured:
    """What the figures are computed from. An attribute is set if a part of the plan needs it."""

    plan: EvaluationPlan
    evaluated: EvaluatedData
    training: TrainingRewards = field(init=False)
    sampled: Samples = field(init=False)
    greedy: Samples = field(init=False)
    logps: ResponseLogps = field(init=False)


# -- parts from samples -----------------------------------------------------------------------------------------------


def controllability(measured: Measured) -> dict[str, Any]:
    """Return how scores follow the goals, of sampled and greedy responses."""
    plan = measured.plan
    found = {"sampled": evaluation.controllability(measured.sampled, plan.goals, plan.seed)}
    if plan.greedy:
        found["greedy"] = evaluation.controllability(measured.greedy, plan.goals, plan.seed)
    return found


def extrapolation(measured: Measured) -> dict[str, Any]:
    """Return how often samples reach the best rewards of training."""
    plan, training = measured.plan, measured.training
    known = add_best_rewards({}, measured.evaluated.pairs)
    figures = evaluation.extrapolation(
        measured.sampled, plan.goals, training.best, known, training.p99, plan.highest_score, plan.seed
    )
    seen = sum(prompt in training.best for prompt in measured.evaluated.histories)
    return figures | {"training": {"split": TRAIN, "responses": training.responses, "prompts_seen": seen}}


def length(measured: Measured) -> dict[str, Any]:
    """Return the length of responses at each goal, and the scores at one length."""
    return evaluation.length(measured.sampled, measured.plan.goals, measured.plan.seed)


# -- parts from log-probabilities -------------------------------------------------------------------------------------


def unlearning(measured: Measured) -> dict[str, Any]:
    """Return the change of the responses' log-probabilities against the base, under several goals."""
    plan, logps = measured.plan, measured.logps

    def changes(keys: Sequence[tuple[Key, Key]]) -> list[float]:
        """Policy minus base: a pair's winner under its first key, the loser under the second."""
        return [logps.policy[two[side]][side] - logps.base[two[side]][side] for two in keys for side in (0, 1)]

    conditions = {
        name: changes([((pair.id, goal.key), (pair.id, goal.key)) for pair in logps.pairs])
        for name, goal in _conditions(plan).items()
    }
    if plan.template is not None:
        own = {pair.id: _own_goals(plan, pair) for pair in logps.pairs}
        conditions["own"] = changes([((one, own[one][0].key), (one, own[one][1].key)) for one in own])
    bins = evaluation.bins_of(*plan.reward_range(measured.evaluated.rewards), plan.bins)
    return evaluation.unlearning(logps.responses, conditions, bins, plan.seed)


def discrimination(measured: Measured) -> dict[str, Any]:
    """Return how well the goal under which a response is most likely predicts its reward."""
    plan, logps = measured.plan, measured.logps
    at = [[logps.policy[pair.id, _state_at(plan, goal).key] for goal in logps.goals] for pair in logps.pairs]
    by_response = np.asarray([[two[side] for two in row] for row in at for side in (0, 1)])
    return evaluation.discrimination(logps.responses, by_response, logps.goals, plan.seed)


FIGURES: dict[Part, Callable[[Measured], dict[str, Any]]] = {
    "controllability": controllability,
    "extrapolation": extrapolation,
    "length": length,
    "unlearning": unlearning,
    "discrimination": discrimination,
}


# -- measurements, and what the document says of them -----------------------------------------------------------------


def check_samples(judged: JudgedSamples, evaluated: EvaluatedData) -> dict[str, Any]:
    """Return ``trouble`` and ``note`` of the document; at least one sample must have a score."""
    scores = judged.scored(greedy=False).scores
    if not scores:
        reasons = "; ".join(f"{count:,} {what}" for what, count in judged.counts.items())
        raise DataError(f"no sample has a score: {reasons or 'none drawn'}")
    found: dict[str, Any] = {}
    if judged.missing or judged.counts:
        found["trouble"] = {"without_score": judged.missing, "counts": dict(judged.counts)}
    low, high = evaluated.rewards
    width = (high - low) or 1.0
    if np.mean([not low - width <= score <= high + width for score in scores]) >= 0.1:
        found["note"] = (
            f"the judge's scores go from {min(scores):g} to {max(scores):g}, the data's rewards from {low:g} to "
            f"{high:g}. Is it the judge of the data? Otherwise extrapolation and slope compare different units."
        )
        print(f"note: {found['note']}")
    return found


def shown_samples(judged: JudgedSamples, evaluated: EvaluatedData) -> list[dict[str, Any]]:
    """Return the samples that are copied into the document: the first of some prompts at each goal."""
    first = set(list(evaluated.histories)[:SHOWN_PROMPTS])
    keys = ("prompt", "goal", "response", "score", "tokens", "greedy")
    return [{key: row[key] for key in keys} for row in judged.rows if row["prompt_id"] in first and row["sample"] == 0]


def measure_logps(
    plan: EvaluationPlan, evaluated: EvaluatedData, work: Path
) -> tuple[ResponseLogps, dict[str, Any]]:  # fmt: skip
    """Return the log-probabilities that the parts need, and ``encoding`` of the document."""
    goals = plan.template.scale.grid(plan.scale_points) if plan.template and "discrimination" in plan.parts else []
    stated = [*_conditions(plan).values(), *(_state_at(plan, goal) for goal in goals)]
    under_goals = GoalLogps(plan, evaluated, stated, work)
    tokens = under_goals.tokens()
    pairs = [pair for pair in evaluated.pairs if pair.id in tokens]
    if not pairs:
        raise DataError("\n".join(["no pair can be encoded.", *evaluated.report.lines()]))
    compared = {
        (pair.id, goal.key)
        for pair in pairs if "unlearning" in plan.parts
        for goal in (*_conditions(plan).values(), *_own_goals(plan, pair))
    }  # fmt: skip
    wanted = compared | {(pair.id, _state_at(plan, goal).key) for pair in pairs for goal in goals}
    policy = under_goals.measure(plan.model, wanted, "logps.jsonl", "log-probabilities")
    base: PairLogpsByKey = {}
    if plan.base is not None:
        base = under_goals.measure(plan.base, compared, "logps-base.jsonl", "log-probabilities, base")
    responses = Responses(
        [prompt_of(pair) for pair in pairs for _ in range(2)],
        [reward for pair in pairs for reward in pair.rewards],
        [count for pair in pairs for count in tokens[pair.id]],
    )
    encoding = _encoding(evaluated, under_goals.encoder.max_length, len(evaluated.pairs) - len(pairs))
    return ResponseLogps(pairs, responses, goals, policy, base), encoding


def _conditions(plan: EvaluationPlan) -> dict[str, StatedGoal]:
    """Return the goals that all responses are read under: none, the best and the worst."""
    if plan.template is None:
        return {"none": StatedGoal()}
    template = plan.template
    return {
        "none": template.unstated, "best": template.state_at(template.best),
        "worst": template.state_at(template.scale.low),
    }  # fmt: skip


def _state_at(plan: EvaluationPlan, goal: float) -> StatedGoal:
    assert plan.template is not None, "goals have a template"
    return plan.template.state_at(goal)


def _own_goals(plan: EvaluationPlan, pair: Pair) -> list[StatedGoal]:
    """Return the winner's and the loser's own goal; nothing without a template."""
    return [] if plan.template is None else plan.template.own_goals(pair.rewards, pair.attributes)


def _encoding(evaluated: EvaluatedData, max_length: int | None, dropped: int) -> dict[str, Any]:
    """Return what was left out or truncated, and print it; nothing if nothing was."""
    cut = {what: tally.count for what, tally in evaluated.report.truncated.items()}
    if not cut and not dropped:
        return {}
    print("\n".join(f"  {n:,}: {what}" for what, n in {**cut, "pairs that can't be encoded": dropped}.items() if n))
    return {"encoding": {"max_length": max_length, "pairs_left_out": dropped, "truncated": cut}}


def separate_without_goal(document: dict[str, Any]) -> None:
    """Move the figures without a goal from the lists by goal to ``without_goal``, so that all goals are numbers."""
    if None not in document["goals"]:
        return
    place = document["goals"].index(None)
    document["goals"] = [goal for goal in document["goals"] if goal is not None]
    apart: dict[str, Any] = {}
    for column in GOAL_COLUMNS:
        if (figures := column.of(document)) is None:
            continue
        target = apart
        for key in column.path[:-1]:
            target = target.setdefault(key, {})
        target[column.path[-1]] = figures.pop(place)
    for decoding in document.get("controllability", {}).values():
        if decoding["argmax"] is not None:
            decoding["argmax"]["shares"].pop(place)
    document["without_goal"] = apart
