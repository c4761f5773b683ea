"""The parts of an evaluation that log-probabilities of the data's responses give: unlearning, discrimination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rap_lightning import evaluation
from rap_lightning.batches.at_goals import AtGoals
from rap_lightning.errors import DataError
from rap_lightning.evaluation import Responses
from rap_lightning.onpolicy.evaluate import evaluation_data as data
from rap_lightning.onpolicy.evaluate.evaluation_plan import OF_LIKELIHOODS, Plan
from rap_lightning.onpolicy.evaluate.response_logps import Key, Likelihoods, make_encoder
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Pair


@dataclass(frozen=True)
class _Read:
    """What the policy, and the base where unlearning is asked for, make of the responses.

    Attributes:
        pairs: those that can be encoded.
        responses: theirs, winner and loser of each pair in turn.
        policy, base: of each pair and goal's text, the log-probability of winner and loser, in nats.
    """

    pairs: list[Pair]
    responses: Responses
    policy: dict[Key, tuple[float, float]]
    base: dict[Key, tuple[float, float]]


def likelihood_parts(plan: Plan, evaluated: data.Evaluated, work: Path) -> dict[str, Any]:
    """The document's parts; what is measured for them lies in the folder ``work``, and is read from there again."""
    conditions = _conditions(plan.template)
    wants = {part: part in plan.parts for part in OF_LIKELIHOODS}
    points = plan.template.scale.grid(plan.scale_points) if plan.template and wants["discrimination"] else []
    texts = [*conditions.values(), *(_at(plan, goal) for goal in points)]
    encoder = make_encoder(plan.model, plan.template, plan.max_length)
    encode = AtGoals(encoder, list(dict.fromkeys(texts)), plan.template)
    measured = Likelihoods(plan.model, evaluated.pairs, encode, evaluated.report)
    tokens = measured.tokens()
    pairs = [pair for pair in evaluated.pairs if pair.id in tokens]
    if not pairs:
        raise DataError("\n".join(["no pair can be encoded.", *evaluated.report.lines()]))
    own = {pair.id: _own(plan, pair) for pair in pairs}
    compared = {(pair.id, text) for pair in pairs for text in (*conditions.values(), *own[pair.id])}
    compared = compared if wants["unlearning"] else set()

    def logps(model: Model, keys: set[Key], name: str, title: str) -> dict[Key, tuple[float, float]]:
        return measured.of(model, keys, work / name, plan.dtype, plan.token_budget, title) if keys else {}

    wanted = compared | {(pair.id, _at(plan, goal)) for pair in pairs for goal in points}
    policy = logps(plan.model, wanted, "logps.jsonl", "log-probabilities")
    base = logps(plan.base, compared, "logps-base.jsonl", "log-probabilities, base") if plan.base else {}
    read = _Read(pairs, _responses(pairs, tokens), policy, base)
    document: dict[str, Any] = {}
    if wants["unlearning"]:
        document["unlearning"] = _unlearning(plan, evaluated, read, conditions, own)
    if wants["discrimination"]:
        document["discrimination"] = _discrimination(plan, read, points)
    return document | _encoding(evaluated, encoder.max_length, len(evaluated.pairs) - len(pairs))


def _conditions(template: GoalTemplate | None) -> dict[str, str | None]:
    """The goals' texts that responses are read under, beside each one's own."""
    if template is None:
        return {"none": None}
    return {"none": None, "best": template.text_at(template.best), "worst": template.text_at(template.scale.low)}


def _at(plan: Plan, goal: float) -> str:
    assert plan.template is not None, "goals have a template"
    return plan.template.text_at(goal)


def _own(plan: Plan, pair: Pair) -> list[str | None]:
    """Winner's and loser's own goals; nothing where there are none."""
    return [] if plan.template is None else list(plan.template.own_texts(pair.rewards, pair.attributes))


def _responses(pairs: Sequence[Pair], tokens: dict[str, tuple[int, int]]) -> Responses:
    return Responses(
        [prompt_id_of(pair.history) for pair in pairs for _ in range(2)],
        [reward for pair in pairs for reward in pair.rewards],
        [count for pair in pairs for count in tokens[pair.id]],
    )


def _unlearning(
    plan: Plan, evaluated: data.Evaluated, read: _Read, conditions: dict[str, str | None],
    own: dict[str, list[str | None]],
) -> dict[str, Any]:  # fmt: skip
    changes = {
        name: _changes([[(p.id, text)] * 2 for p in read.pairs], read.policy, read.base)
        for name, text in conditions.items()
    }
    if plan.template is not None:
        changes["own"] = _changes([[(p.id, text) for text in own[p.id]] for p in read.pairs], read.policy, read.base)
    bins = evaluation.bins_of(*plan.range(evaluated), plan.bins)
    return evaluation.unlearning(read.responses, changes, bins, plan.seed)


def _discrimination(plan: Plan, read: _Read, points: list[float]) -> dict[str, Any]:
    at = [[read.policy[pair.id, _at(plan, goal)] for goal in points] for pair in read.pairs]
    logps = np.asarray([[two[side] for two in row] for row in at for side in (0, 1)])
    return evaluation.discrimination(read.responses, logps, points, plan.seed)


def _encoding(evaluated: data.Evaluated, max_length: int | None, dropped: int) -> dict[str, Any]:
    """What was left out or cut, told and for the document; nothing where nothing was."""
    cut = {what: tally.count for what, tally in evaluated.report.truncated.items()}
    if not cut and not dropped:
        return {}
    print("\n".join(f"  {n:,}: {what}" for what, n in {**cut, "pairs that can't be encoded": dropped}.items() if n))
    return {"encoding": {"max_length": max_length, "pairs_left_out": dropped, "truncated": cut}}


def _changes(
    keys: list[list[Key]], policy: dict[Key, tuple[float, float]], base: dict[Key, tuple[float, float]]
) -> list[float]:
    """Policy minus base of each response: the first of a pair under the first key, the second under the second."""
    return [policy[two[side]][side] - base[two[side]][side] for two in keys for side in (0, 1)]
