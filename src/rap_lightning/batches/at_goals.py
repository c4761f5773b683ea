"""Scored pairs under any goals, not only their own, to measure log-probabilities on.

:class:`AtGoals` encodes pairs, :func:`in_passes` groups them into forward passes, and :func:`batch_of` makes the batch
of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from rap_lightning.batches.dataset import Example, PairEncoder, note_encoding
from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate, StatedGoal
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabelling import CHOSEN_GOAL, UNCONDITIONED, Relabelling


class AtGoals(PairEncoder):
    """Encodes pairs as for training, with a prompt for each of several goals.

    Args:
        encoder: renders and tokenises.
        goals: for every pair.
        own: the template of each response's own goal, which is added; None: it is not.
    """

    def __init__(self, encoder: Encoder, goals: Sequence[StatedGoal], own: GoalTemplate | None) -> None:
        super().__init__(encoder, Relabelling("none"))
        self.goals, self.own = tuple(goals), own

    def goals_of(self, pair: Pair) -> tuple[StatedGoal, ...]:
        """Every goal once."""
        own = self.own.own_goals(pair.rewards, pair.attributes) if self.own is not None else []
        return tuple(dict.fromkeys([*self.goals, *own]))

    def examples(self, pairs: Sequence[Pair], report: DataReport) -> list[Example]:
        """Each pair under each of its goals; pairs that can't be encoded are counted in the report and left out.

        The ``goal`` of an example is the key of its StatedGoal, and its chosen response is the pair's first.
        """
        rows = self(pairs)
        return [
            Example(
                pair.id,
                UNCONDITIONED if stated == StatedGoal() else CHOSEN_GOAL,
                stated.key,
                pair.rewards,
                prompt,
                row["response_ids"][0],
                row["response_ids"][1],
                strength=stated.strength,
            )
            for pair, row, good in zip(pairs, rows, note_encoding(rows, report), strict=True)
            if good
            for stated, prompt in zip(self.goals_of(pair), row["prompt_ids"], strict=True)
        ]


def in_passes(examples: Sequence[Example], layout: str, budget: int) -> list[list[Example]]:
    """Forward passes of at most ``budget`` tokens (at least one example each), the longest first; deterministic."""
    tokens = LAYOUTS[layout].tokens
    passes: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: -tokens([one.size])):  # stable
        if passes and tokens([one.size for one in (*passes[-1], example)]) <= budget:
            passes[-1].append(example)
        else:
            passes.append([example])
    return passes


def batch_of(examples: Sequence[Example], layout: str, pad_id: int) -> Batch:
    """The batch of one forward pass; pair i of it is example i."""
    places = tuple(range(len(examples)))
    plan = BatchPlan(places, (1.0,) * len(examples), len(examples), (places,))
    return lay_out(LAYOUTS[layout], examples, plan, pad_id)
