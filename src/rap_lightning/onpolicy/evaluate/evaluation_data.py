"""What a model is evaluated on: some prompts of a split with their scored pairs, and what training showed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.evaluate.reading import Reading
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import Message, Pair
from rap_lightning.preferences.read_pairs import fit_scale, read_pairs, rewards_of
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import LinearScale
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, fingerprint, having, splits_among

TRAIN = "train"


@dataclass
class Evaluated:
    """Prompts and their pairs.

    Attributes:
        split: that the prompts are of.
        histories: the prompts, as conversations.
        pairs: theirs, in the order of the data, each once.
        report: what became of the split's rows.
        available: prompts in the split.
        prompt_ids: of the prompts.
    """

    split: str
    histories: list[Sequence[Message]]
    pairs: list[Pair]
    report: DataReport
    available: int = 0
    prompt_ids: list[str] = field(default_factory=list)

    @property
    def rewards(self) -> tuple[float, float]:
        """Lowest and highest reward of the pairs."""
        every = [reward for pair in self.pairs for reward in pair.rewards]
        return min(every), max(every)

    def lines(self) -> list[str]:
        """For people."""
        head = f"{len(self.histories):,} of {self.available:,} prompts of the split {self.split}, "
        return [*self.report.lines(), head + f"{len(self.pairs):,} scored pairs of theirs"]


@dataclass(frozen=True)
class Seen:
    """What training showed.

    Attributes:
        best: prompt id to the highest reward of its responses.
        p99: 99th percentile of the rewards of all responses.
        responses: how many there are.
        split: of the source.
    """

    best: dict[str, float]
    p99: float
    responses: int
    split: str


def make_rules(template: GoalTemplate | None, reading: Reading, sources: Sequence[Source]) -> Rules:
    """How rows are read: scored pairs, without those of equal reward.

    Without a template of the model, rewards are taken as they are, whatever their range.
    """
    goal = template or OverallGoal(LinearScale(decimals=6))
    rules = Rules(goal, Relabelling("none"), **vars(reading))
    if goal.scale.needs_fit:
        if template is not None:
            raise ConfigError(
                "--template: the scale's open numbers are those of the training run; give them (goal.json has them)."
            )
        splits = splits_among(sources)
        fit_scale(
            rules, having(sources, TRAIN if TRAIN in splits else splits[0]), TRAIN if TRAIN in splits else splits[0]
        )
    return rules


def read_evaluated(
    sources: Sequence[Source], rules: Rules, split: str | None, limit: int, seed: int, num_proc: int | None
) -> Evaluated:
    """A seeded choice of prompts of a split, with their pairs.

    Args:
        sources: of scored data.
        rules: of reading.
        split: by default the first held-out one there is, or the only one.
        limit: at most so many prompts.
        seed: of the choice, which depends on nothing but it and the prompt's text.
        num_proc: processes that share the reading.
    """
    splits = splits_among(sources)
    name = split or next((one for one in VALIDATION_NAMES if one in splits), splits[0])
    report = DataReport(", ".join(source.path for source in sources), name)
    pairs: dict[str, Pair] = {}
    for source in having(sources, name):
        for pair in read_pairs(source, name, rules, report, num_proc=num_proc):
            pairs.setdefault(pair.id, pair)
    histories = {prompt_id_of(pair.history): pair.history for pair in pairs.values()}
    drawn = sorted(histories, key=lambda one: hash_text(f"{seed} {hash_turns(histories[one])}"))[:limit]
    kept = set(drawn)
    chosen = [one for one in histories if one in kept]  # in the order of the data
    found = [pair for pair in pairs.values() if prompt_id_of(pair.history) in kept]
    return Evaluated(name, [histories[one] for one in chosen], found, report, len(histories), chosen)


def read_seen(sources: Sequence[Source], rules: Rules, num_proc: int | None) -> Seen | str:
    """What the training split showed; in words why that isn't known."""
    splits = splits_among(sources)
    if TRAIN not in splits:
        return f"the data have no split named {TRAIN}, only {', '.join(splits)}"
    best: dict[str, float] = {}
    rewards: list[float] = []
    # ties show a reward too
    every = replace(rules, ties="chosen")
    for source in having(sources, TRAIN):
        pairs = read_pairs(source, TRAIN, every, DataReport(source.path, TRAIN), num_proc=num_proc)
        best = best_rewards(pairs, best)
        rewards += _on_scale(rewards_of(source, TRAIN, rules, num_proc=num_proc), rules)
    if not rewards:
        raise DataError(f"{', '.join(s.path for s in sources)} (split {TRAIN}): no reward.")
    return Seen(best, float(np.percentile(rewards, 99)), len(rewards), TRAIN)


def training_print(sources: Sequence[Source]) -> str:
    """A digest of the training split, without reading it; "" where there is none."""
    if TRAIN not in splits_among(sources):
        return ""
    return " ".join(fingerprint(source, TRAIN) for source in having(sources, TRAIN))


def _on_scale(rewards: list[float], rules: Rules) -> list[float]:
    """Rewards as training stated them: those outside the scale left out, or clipped, as the rules say."""
    if rules.goal is None or rules.outside_scale == "error":
        return rewards
    low, high = rules.goal.scale.judge_range
    if rules.outside_scale == "clip":
        return [min(max(reward, low), high) for reward in rewards]
    return [reward for reward in rewards if low <= reward <= high]


def best_rewards(pairs: Iterable[Pair], before: Mapping[str, float] | None = None) -> dict[str, float]:
    """Prompt id to the highest reward of its responses, in these pairs and before."""
    best = dict(before or {})
    for pair in pairs:
        one = prompt_id_of(pair.history)
        best[one] = max(best.get(one, -np.inf), pair.rewards[0])
    return best


def shown_prompt(history: Sequence[Message]) -> str:
    """A conversation as one text: that of a single user turn alone, otherwise each turn after its role."""
    if len(history) == 1:
        return str(history[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in history)


def plain_scale(rules: Rules, evaluated: Evaluated, declared: Any) -> tuple[float, float]:
    """The range of rewards: the judge's own, the goals' scale, or what the pairs have."""
    low, high = rules.goal.scale.judge_range if rules.goal is not None else (-np.inf, np.inf)
    if np.isfinite(low) and np.isfinite(high):
        return float(low), float(high)
    if declared is not None:
        return float(declared[0]), float(declared[1])
    return evaluated.rewards
