"""Scored pairs under any goals, not only their own, to measure log-probabilities on.

:class:`AtGoals` encodes pairs, :func:`in_passes` groups them into forward passes, :func:`batch_of` makes the batch of a
pass, and :func:`two_by_two` reads its log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rap_lightning.batches.dataset import Example, PairEncoder, note_encoding
from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.batches.types import Batch, split_segments
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabelling import CHOSEN_GOAL, UNCONDITIONED, Relabelling


@dataclass(frozen=True)
class AtGoal:
    """Both responses of a pair under one goal.

    Attributes:
        pair: number of the pair.
        text: the goal's text in the prompt; None for the prompt without a goal.
        example: token ids; its chosen response is the pair's first.
    """

    pair: int
    text: str | None
    example: Example

    @property
    def size(self) -> PairSize:
        """Tokens of the prompt and both responses."""
        example = self.example
        return PairSize(len(example.prompt_ids), len(example.chosen_ids), len(example.rejected_ids))


class AtGoals(PairEncoder):
    """Encodes pairs as for training, with a prompt for each of several goals.

    Args:
        encoder: renders and tokenises.
        texts: of the goals for every pair; None is the prompt without a goal.
        own: the template of each response's own goal, which is added; None: it is not.
    """

    def __init__(self, encoder: Encoder, texts: Sequence[str | None], own: GoalTemplate | None) -> None:
        super().__init__(encoder, Relabelling("none"))
        self.texts, self.own = tuple(texts), own

    def goal_texts(self, pair: Pair) -> tuple[str | None, ...]:
        """Every text once."""
        own = self.own.own_texts(pair.rewards, pair.attributes) if self.own is not None else []
        return tuple(dict.fromkeys([*self.texts, *own]))

    def examples(self, pairs: Sequence[Pair], report: DataReport) -> list[AtGoal]:
        """Each pair under each of its goals; pairs that can't be encoded are counted in the report and left out."""
        found = []
        rows = self(pairs)
        for number, (pair, row, good) in enumerate(zip(pairs, rows, note_encoding(rows, report), strict=True)):
            if not good:
                continue
            for text, prompt in zip(self.goal_texts(pair), row["prompt_ids"], strict=True):
                origin = UNCONDITIONED if text is None else CHOSEN_GOAL
                found.append(
                    AtGoal(number, text, Example(pair.id, origin, text, pair.rewards, prompt, *row["response_ids"]))
                )
        return found


def in_passes(items: Sequence[AtGoal], layout: str, budget: int) -> list[list[AtGoal]]:
    """Forward passes of at most ``budget`` tokens (at least one item each), the longest first; deterministic."""
    tokens = LAYOUTS[layout].tokens
    passes: list[list[AtGoal]] = []
    for item in sorted(items, key=lambda item: -tokens([item.size])):  # stable
        if passes and tokens([one.size for one in (*passes[-1], item)]) <= budget:
            passes[-1].append(item)
        else:
            passes.append([item])
    return passes


def batch_of(items: Sequence[AtGoal], layout: str, pad_id: int) -> Batch:
    """The batch of one forward pass; pair i of it is item i."""
    places = tuple(range(len(items)))
    plan = BatchPlan(places, (1.0,) * len(items), len(items), (places,))
    return lay_out(LAYOUTS[layout], [item.example for item in items], plan, pad_id)


def two_by_two(values: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Values in segment order as (first, second) of each item."""
    yield from zip(*split_segments(values), strict=True)
