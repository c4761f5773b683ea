"""The paper's relabelling: one scored pair becomes two goal-conditioned pairs.

Under goal g the implied reward of a response is -(g - r)^2 (arXiv 2410.08067, section 4), so each of the two responses
wins under its own reward as the goal. With responses numbered 0 (winner) and 1 (loser), the half numbered h has

    goal = rewards[h],   chosen = responses[h],   rejected = responses[1 - h]

and that is all: N pairs become 2N by counting, and no row is copied or edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Message, Pair

ORIGINS = ("chosen-goal", "rejected-goal", "unconditioned")
"""Which half a pair is: conditioned on the winner's reward, on the loser's, or a plain pair without a goal."""

UNCONDITIONED = ORIGINS.index("unconditioned")


def halves(conditioned: bool) -> int:
    """How many training pairs one scored pair becomes."""
    return 2 if conditioned else 1


def locate(index: int, conditioned: bool) -> tuple[int, int]:
    """(row, half) of training pair ``index``."""
    return divmod(index, halves(conditioned))


def is_tie(pair: Pair, goal: GoalTemplate) -> bool:
    """True where both goals print the same: the halves would contradict each other (law 2)."""
    return goal.printed(pair.rewards[0]) == goal.printed(pair.rewards[1])


@dataclass(frozen=True)
class RelabelledPair:
    """One training pair as text.

    Attributes:
        pair_id: the id of the pair it was made from.
        origin: one of :data:`ORIGINS`.
        goal: the goal as printed, ``None`` for an unconditioned pair.
        goal_text: the text that states it.
        history: the turns before the response, without the goal.
        chosen, rejected: the response preferred under this goal, and the other one.
        rewards: rewards of chosen and rejected, in the scale's units.
    """

    pair_id: str
    origin: str
    goal: str | None
    goal_text: str | None
    history: tuple[Message, ...]
    chosen: str
    rejected: str
    rewards: tuple[float, float]


def relabel(pair: Pair, goal: GoalTemplate | None, half: int) -> RelabelledPair:
    """The ``half``-th training pair of ``pair``; with ``goal=None`` the plain pair (half 0 only)."""
    other = 1 - half
    reward = pair.rewards[half]
    return RelabelledPair(
        pair_id=pair.id,
        origin=ORIGINS[half if goal else UNCONDITIONED],
        goal=goal.printed(reward) if goal else None,
        goal_text=goal.text(reward) if goal else None,
        history=pair.history,
        chosen=pair.responses[half],
        rejected=pair.responses[other],
        rewards=(reward, pair.rewards[other]),
    )


class RelabelledView(Sequence[RelabelledPair]):
    """2N training pairs over N scored pairs, without copying them.

    Args:
        pairs: the scored pairs; ties must have been dropped.
        goal: the template, or ``None`` for the N plain pairs.

    Raises:
        ValueError: a tie is asked for.
    """

    def __init__(self, pairs: Sequence[Pair], goal: GoalTemplate | None) -> None:
        self.pairs, self.goal = pairs, goal

    def __len__(self) -> int:
        return len(self.pairs) * halves(self.goal is not None)

    def __getitem__(self, index: int) -> RelabelledPair:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row, half = locate(index % len(self), self.goal is not None)
        pair = self.pairs[row]
        if self.goal is not None and is_tie(pair, self.goal):
            raise ValueError(f"pair {pair.id} is a tie: both goals print {self.goal.printed(pair.rewards[0])}")
        return relabel(pair, self.goal, half)
