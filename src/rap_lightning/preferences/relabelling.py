"""The paper's relabelling: one scored pair becomes two goal-conditioned pairs.

Under goal g the implied reward of a response is -(g - r)^2 (arXiv 2410.08067, section 4), so each of the two responses
wins under its own reward as the goal. With responses numbered 0 (winner) and 1 (loser), the half numbered h has

    goal = rewards[h],   chosen = responses[h],   rejected = responses[1 - h]

so N pairs become 2N by index arithmetic, and no row is copied or edited.

Read in this order: :data:`ORIGIN_TABLE`, the kinds of training pair; :class:`Relabelling`, which of them a scored pair
becomes; :func:`relabel`, one training pair as text; :class:`RelabelledView`, all of them as a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import Message, Pair


@dataclass(frozen=True)
class Origin:
    """One way to make a training pair of a scored pair.

    Attributes:
        name: in metrics and exported data.
        goal: ``own`` is the reward of the chosen response; None writes no goal.
        chosen: number of the response that is chosen: 0 the winner, 1 the loser.
        description: for the card of exported data.
    """

    name: str
    goal: Literal["own"] | None
    chosen: int
    description: str


ORIGIN_TABLE = (
    Origin("chosen-goal", "own", 0, "the winner's reward is the goal, and the winner is chosen"),
    Origin("rejected-goal", "own", 1, "the loser's reward is the goal, and the loser is chosen"),
    Origin("unconditioned", None, 0, "no goal, the winner is chosen"),
)
"""The kinds of training pair. A batch holds indices into this table."""

CHOSEN_GOAL, REJECTED_GOAL, UNCONDITIONED = range(3)

ORIGINS = tuple(origin.name for origin in ORIGIN_TABLE)
"""The names of :data:`ORIGIN_TABLE`."""

Mode = Literal["both", "chosen", "rejected", "none", "half"]

CONDITIONED: dict[Mode, tuple[int, ...]] = {
    "both": (CHOSEN_GOAL, REJECTED_GOAL),
    "half": (CHOSEN_GOAL, REJECTED_GOAL),
    "chosen": (CHOSEN_GOAL,),
    "rejected": (REJECTED_GOAL,),
    "none": (),
}
"""The goal-conditioned training pairs of each mode, as indices into :data:`ORIGIN_TABLE`."""


@dataclass(frozen=True)
class Relabelling:
    """Which training pairs one scored pair becomes; the modes are those of the option ``relabel``."""

    mode: Mode = "both"
    keep_original: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode == "none" and self.keep_original:
            raise ConfigError("keep_original has no effect with relabel none, which keeps the originals alone.")

    @classmethod
    def of(cls, mode: Mode | None, goal: GoalTemplate | None, keep_original: bool, seed: int) -> Relabelling:
        """Return the relabelling for options; a ``mode`` of None is ``both`` with a goal and ``none`` without one."""
        return cls(mode or ("none" if goal is None else "both"), keep_original, seed)

    @property
    def origins(self) -> tuple[int, ...]:
        """What a scored pair becomes, as indices into :data:`ORIGIN_TABLE`."""
        conditioned = CONDITIONED[self.mode]
        return conditioned if conditioned and not self.keep_original else (*conditioned, UNCONDITIONED)

    @property
    def of_ties(self) -> tuple[int, ...]:
        """What a pair becomes whose goals print the same: never both halves, because they would contradict each other.

        This is law 2 (docs/invariants.md).
        """
        return tuple(origin for origin in self.origins if ORIGIN_TABLE[origin].chosen == 0)

    def origins_of(self, pair: Pair) -> tuple[int, ...]:
        return self.of_ties if pair.tie else self.origins

    def weights(self, rejected: float) -> tuple[float, ...]:
        """Return the loss weight of a training pair of each entry of :data:`ORIGIN_TABLE`.

        Args:
            rejected: weight of the rejected-goal half; the others have weight 1.

        Raises:
            ConfigError: it is not above 0, or there are no two halves to weigh against each other.
        """
        if rejected == 0:
            raise ConfigError("rejected_weight 0 leaves out the rejected-goal half: that is relabel chosen.")
        if not 0 < rejected < float("inf"):
            raise ConfigError(f"rejected_weight must be above 0 and finite, found {rejected}")
        if rejected != 1 and (REJECTED_GOAL not in self.origins or len(self.origins) == 1):
            raise ConfigError(
                f"rejected_weight {rejected:g} has no effect with relabel {self.mode}, which leaves nothing to weigh "
                "the rejected-goal half against. Use relabel both, or remove it."
            )
        return tuple(rejected if origin == REJECTED_GOAL else 1.0 for origin in range(len(ORIGIN_TABLE)))

    @property
    def conditioned(self) -> bool:
        return self.origins != (UNCONDITIONED,)

    def takes(self, history: Sequence[Message]) -> bool:
        """Return whether a prompt is used: in mode ``half`` a seeded half of them, in other modes all."""
        if self.mode != "half":
            return True
        return hash_text(f"{self.seed} {hash_turns(history)}") % 2 == 0


class TrainingIndex:
    """Map training pair i to its scored pair and origin by arithmetic, in constant memory.

    The training pairs of pair 0 come first, then those of pair 1, and so on; pairs that tie come after all others.
    """

    def __init__(self, pairs: int, ties: int = 0, relabelling: Relabelling = Relabelling()) -> None:
        self.pairs, self.ties = pairs, ties
        self.origins, self.of_ties = relabelling.origins, relabelling.of_ties

    def __len__(self) -> int:
        return self.pairs * len(self.origins) + self.ties * len(self.of_ties)

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        untied = self.pairs * len(self.origins)
        if index < untied:
            row, place = divmod(index, len(self.origins))
            return row, self.origins[place]
        row, place = divmod(index - untied, len(self.of_ties))
        return self.pairs + row, self.of_ties[place]


def is_tie(goal: GoalTemplate | None, rewards: tuple[float, float], attributes: Sequence[Sequence[float]]) -> bool:
    """Return whether both goals read the same, or neither response has the higher reward (law 2)."""
    if goal is None or rewards[0] == rewards[1]:
        return rewards[0] == rewards[1]
    first, second = goal.own_texts(rewards, attributes)
    return first == second


@dataclass(frozen=True)
class RelabelledPair:
    """One training pair as text.

    Attributes:
        pair_id: the id of the pair it was made from.
        origin: one of :data:`ORIGINS`.
        goal: the goal as printed, None for an unconditioned pair.
        goal_text: the text that states it.
        history: the turns before the response, without the goal.
        chosen, rejected: the response preferred under this goal, and the other one.
        rewards: rewards of chosen and rejected, in the judge's units.
    """

    pair_id: str
    origin: str
    goal: str | None
    goal_text: str | None
    history: tuple[Message, ...]
    chosen: str
    rejected: str
    rewards: tuple[float, float]


def relabel(pair: Pair, goal: GoalTemplate | None, origin: int) -> RelabelledPair:
    """Return one training pair of a scored pair.

    Args:
        pair: the scored pair.
        goal: the template; None writes no goal.
        origin: index into :data:`ORIGIN_TABLE`.

    >>> from rap_lightning import OverallGoal
    >>> pair = Pair("1", ({"role": "user", "content": "2 + 2?"},), ("4", "22"), (9.0, 2.5))
    >>> for origin in (CHOSEN_GOAL, REJECTED_GOAL):  # under the loser's reward, the loser is chosen
    ...     one = relabel(pair, OverallGoal(), origin)
    ...     print(f"goal {one.goal}: {one.chosen!r} beats {one.rejected!r}")
    goal 9: '4' beats '22'
    goal 2.5: '22' beats '4'
    """
    made = ORIGIN_TABLE[origin]
    half = made.chosen
    printed = text = None
    if goal is not None and made.goal == "own":
        asked = goal.goal_of(pair.rewards[half], pair.attributes[half])
        printed, text = goal.printed(*asked), goal.write(*asked)
    return RelabelledPair(
        pair_id=pair.id,
        origin=made.name,
        goal=printed,
        goal_text=text,
        history=pair.history,
        chosen=pair.responses[half],
        rejected=pair.responses[1 - half],
        rewards=(pair.rewards[half], pair.rewards[1 - half]),
    )


class RelabelledView(Sequence[RelabelledPair]):
    """A sequence of the training pairs of scored pairs, without copying them.

    Args:
        pairs: the scored pairs, those marked as ties last.
        goal: the template, or None for the plain pairs.
        relabelling: what each pair becomes.

    Raises:
        ValueError: both halves of a tie are asked for.

    >>> from rap_lightning import OverallGoal
    >>> pair = Pair("1", ({"role": "user", "content": "2 + 2?"},), ("4", "22"), (9.0, 2.5))
    >>> view = RelabelledView([pair], OverallGoal())
    >>> [(one.origin, one.goal, one.chosen) for one in view]
    [('chosen-goal', '9', '4'), ('rejected-goal', '2.5', '22')]
    """

    def __init__(
        self, pairs: Sequence[Pair], goal: GoalTemplate | None, relabelling: Relabelling | None = None
    ) -> None:
        self.pairs, self.goal = pairs, goal
        relabelling = relabelling or Relabelling.of(None, goal, keep_original=False, seed=0)
        ties = sum(pair.tie for pair in pairs)
        self._places = TrainingIndex(len(pairs) - ties, ties, relabelling)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> RelabelledPair:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row, origin = self._places[index % len(self)]
        pair = self.pairs[row]
        if self.goal is not None and origin == REJECTED_GOAL and is_tie(self.goal, pair.rewards, pair.attributes):
            raise ValueError(f"pair {pair.id} is a tie: both goals read the same")
        return relabel(pair, self.goal, origin)
