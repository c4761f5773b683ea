"""The data of an evaluation: some prompts of a split with their scored pairs, and the rewards that training saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rap_lightning.errors import DataError
from rap_lightning.onpolicy.engines.base import prompt_id_of
from rap_lightning.onpolicy.evaluate.evaluation_plan import TRAIN, EvaluationPlan
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import Message, Pair, carrying
from rap_lightning.preferences.read_pairs import read_pairs, rewards_of
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, fingerprint, having, splits_among


@dataclass
class EvaluatedData:
    """The evaluated prompts by id and their distinct pairs, in the order of the data.

    ``report`` counts the split's rows; ``available`` is the number of prompts in the split.
    """

    split: str
    histories: Mapping[str, Sequence[Message]]
    pairs: list[Pair]
    report: DataReport
    available: int

    @property
    def rewards(self) -> tuple[float, float]:
        """Lowest and highest reward of the pairs."""
        rewards = [reward for pair in self.pairs for reward in pair.rewards]
        return min(rewards), max(rewards)

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        head = f"{len(self.histories):,} of {self.available:,} prompts of the split {self.split}, "
        return [*self.report.lines(), head + f"{len(self.pairs):,} scored pairs of theirs"]


@dataclass(frozen=True)
class TrainingRewards:
    """The rewards that training saw: the highest of each prompt, by id, and the 99th percentile of all responses."""

    best: dict[str, float]
    p99: float
    responses: int


def prompt_of(pair: Pair) -> str:
    """Return the id of a pair's conversation, with its tools."""
    return prompt_id_of(carrying(pair.history, pair.tools))


def read_evaluated(plan: EvaluationPlan) -> EvaluatedData:
    """Read a choice of prompts, which depends on the seed and their text alone, with their pairs."""
    splits = splits_among(plan.sources)
    name = plan.split or next((one for one in VALIDATION_NAMES if one in splits), splits[0])
    report = DataReport(", ".join(source.path for source in plan.sources), name)
    pairs: dict[str, Pair] = {}
    for source in having(plan.sources, name):
        for pair in read_pairs(source, name, plan.rules, report, num_proc=plan.num_proc):
            pairs.setdefault(pair.id, pair)
    histories = {prompt_of(pair): carrying(pair.history, pair.tools) for pair in pairs.values()}
    drawn = sorted(histories, key=lambda one: hash_text(f"{plan.seed} {hash_turns(histories[one])}"))
    kept = set(drawn[: plan.limit])
    chosen = {one: history for one, history in histories.items() if one in kept}
    found = [pair for pair in pairs.values() if prompt_of(pair) in kept]
    return EvaluatedData(name, chosen, found, report, len(histories))


def read_training_rewards(plan: EvaluationPlan) -> TrainingRewards:
    """Read the rewards of the training split."""
    best: dict[str, float] = {}
    rewards: list[float] = []
    with_ties = replace(plan.rules, ties="chosen")  # a tied pair shows a reward too
    for source in having(plan.sources, TRAIN):
        report = DataReport(source.path, TRAIN)
        add_best_rewards(best, read_pairs(source, TRAIN, with_ties, report, num_proc=plan.num_proc))
        rewards += _as_training_stated(rewards_of(source, TRAIN, plan.rules, num_proc=plan.num_proc), plan.rules)
    if not rewards:
        raise DataError(f"{', '.join(s.path for s in plan.sources)} (split {TRAIN}): no reward.")
    return TrainingRewards(best, float(np.percentile(rewards, 99)), len(rewards))


def training_fingerprint(sources: Sequence[Source]) -> str:
    """Return a digest of the training split, without reading it; "" if there is none."""
    if TRAIN not in splits_among(sources):
        return ""
    return " ".join(fingerprint(source, TRAIN) for source in having(sources, TRAIN))


def _as_training_stated(rewards: list[float], rules: Rules) -> list[float]:
    """Drop or clip rewards outside the scale, as the rules say."""
    low, high = rules.goal.scale.judge_range if rules.goal is not None else (-np.inf, np.inf)
    if rules.outside_scale == "clip":
        return [min(max(reward, low), high) for reward in rewards]
    return [reward for reward in rewards if rules.outside_scale == "error" or low <= reward <= high]


def add_best_rewards(best: dict[str, float], pairs: Iterable[Pair]) -> dict[str, float]:
    """Raise ``best`` (highest reward by prompt id) to the rewards of these pairs, and return it."""
    for pair in pairs:
        one = prompt_of(pair)
        best[one] = max(best.get(one, -np.inf), pair.rewards[0])
    return best
