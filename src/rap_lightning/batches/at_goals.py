"""Scored pairs under any goals, not only their own: what likelihoods are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.pair_encoder import PairEncoder, note_encoding
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.batches.types import Batch
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabelling import CHOSEN_GOAL, UNCONDITIONED, Relabelling


@dataclass(frozen=True)
class AtGoal:
    """Both responses of a pair under one goal.

    Attributes:
        pair: number of the pair.
        text: what the prompt says of the goal; None: nothing.
        example: token ids; its chosen response is the pair's first.
    """

    pair: int
    text: str | None
    example: Example


class AtGoals(PairEncoder):
    """Encodes pairs as for training, with a prompt for each of some goals.

    Args:
        encoder: renders and tokenises.
        texts: of goals that every pair is wanted under; None is the plain prompt.
        own: the template of the responses' own goals, which are wanted too; None: they are not.
    """

    def __init__(self, encoder: Encoder, texts: Sequence[str | None], own: GoalTemplate | None) -> None:
        super().__init__(encoder, Relabelling("none"))
        self.texts, self.own = tuple(texts), own

    def goal_texts(self, pair: Pair) -> tuple[str | None, ...]:
        """Every text once."""
        own = self.own.own_texts(pair.rewards, pair.attributes) if self.own is not None else []
        return tuple(dict.fromkeys([*self.texts, *own]))

    def examples(self, pairs: Sequence[Pair], report: DataReport) -> list[AtGoal]:
        """Each pair under each of its goals; those that can't be encoded are counted in the report and left out.

        Prompt and response are cut alike under all goals, so that the same tokens are compared.
        """
        found = []
        rows = self(pairs)
        for number, (pair, row, good) in enumerate(zip(pairs, rows, note_encoding(rows, report), strict=True)):
            if not good:
                continue
            room = self.encoder.max_length - max(map(len, row["prompt_ids"]))
            chosen, rejected = (ids[:room] for ids in row["response_ids"])
            for text, prompt in zip(self.goal_texts(pair), row["prompt_ids"], strict=True):
                origin = UNCONDITIONED if text is None else CHOSEN_GOAL
                example = Example(pair.id, origin, text, pair.rewards, prompt, chosen, rejected)
                found.append(AtGoal(number, text, example))
        return found


def in_passes(items: Sequence[AtGoal], layout: str, budget: int) -> list[list[AtGoal]]:
    """Forward passes of at most ``budget`` tokens (one item at least), the longest first; the same in every run."""
    tokens = LAYOUTS[layout].tokens
    sizes = {id(item): _size(item.example) for item in items}
    ordered = sorted(items, key=lambda item: -tokens([sizes[id(item)]]))  # stable
    passes: list[list[AtGoal]] = []
    for item in ordered:
        if passes and tokens([*(sizes[id(one)] for one in passes[-1]), sizes[id(item)]]) <= budget:
            passes[-1].append(item)
        else:
            passes.append([item])
    return passes


def batch_of(items: Sequence[AtGoal], layout: str, pad_id: int) -> Batch:
    """One forward pass; the responses of item i are segments 2i and 2i + 1."""
    places = tuple(range(len(items)))
    plan = BatchPlan(places, (1.0,) * len(items), len(items), (places,))
    return lay_out(LAYOUTS[layout], [item.example for item in items], plan, pad_id)


def two_by_two(values: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Values of segments as (first, second) of each item."""
    yield from zip(values[0::2], values[1::2], strict=True)


def _size(example: Example) -> PairSize:
    return PairSize(len(example.prompt_ids), len(example.chosen_ids), len(example.rejected_ids))
