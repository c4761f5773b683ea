"""The paper's relabelling: one scored pair becomes two goal-conditioned pairs.

Under goal g the implied reward of a response is -(g - r)^2 (arXiv 2410.08067, section 4), so each of the two responses
wins under its own reward as the goal. With responses numbered 0 (winner) and 1 (loser), the half numbered h has

    goal = rewards[h],   chosen = responses[h],   rejected = responses[1 - h]

and that is all: N pairs become 2N by counting, and no row is copied or edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import Message, Pair

ORIGINS = ("chosen-goal", "rejected-goal", "unconditioned")
"""Which half a pair is: conditioned on the winner's reward, on the loser's, or a plain pair without a goal."""

CHOSEN_GOAL, REJECTED_GOAL, UNCONDITIONED = range(3)

Mode = Literal["both", "chosen", "rejected", "none", "half"]


@dataclass(frozen=True)
class Relabelling:
    """Which training pairs one scored pair becomes.

    Args:
        mode: ``both`` halves (the paper); the ``chosen`` one only, or the ``rejected`` one; ``none``, the plain pair
            without a goal (the baseline); ``half``, both halves of a seeded half of the prompts (the paper's Half-RA:
            as many training pairs as without relabelling).
        keep_original: the plain pair stands beside the conditioned ones.
        seed: of the half.
    """

    mode: Mode = "both"
    keep_original: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode == "none" and self.keep_original:
            raise ConfigError("keep_original has no effect with relabel none, which keeps the originals alone.")

    @classmethod
    def of(cls, mode: Mode | None, goal: GoalTemplate | None, keep_original: bool, seed: int) -> Relabelling:
        """With ``mode`` left open both halves where there is a goal, and none where there isn't."""
        return cls(mode or ("none" if goal is None else "both"), keep_original, seed)

    @property
    def origins(self) -> tuple[int, ...]:
        """What each scored pair becomes, as indices into :data:`ORIGINS`."""
        halves = {"chosen": (CHOSEN_GOAL,), "rejected": (REJECTED_GOAL,), "none": ()}
        conditioned = halves.get(self.mode, (CHOSEN_GOAL, REJECTED_GOAL))
        return conditioned if conditioned and not self.keep_original else (*conditioned, UNCONDITIONED)

    @property
    def of_ties(self) -> tuple[int, ...]:
        """What a pair becomes whose goals print the same: never both halves, for they would contradict each other."""
        return tuple(origin for origin in self.origins if origin != REJECTED_GOAL)

    def weights(self, rejected: float) -> tuple[float, ...]:
        """What the loss of a training pair of each of :data:`ORIGINS` counts in a mean over pairs.

        Args:
            rejected: of the rejected-goal half, where the others count 1.

        Raises:
            ConfigError: it is not above 0, or there are no two halves to weigh against each other.
        """
        if rejected == 0:
            raise ConfigError("rejected_weight 0 leaves the rejected-goal half out: that is relabel chosen.")
        if not 0 < rejected < float("inf"):
            raise ConfigError(f"rejected_weight must be above 0 and finite, found {rejected}")
        if rejected != 1 and (REJECTED_GOAL not in self.origins or len(self.origins) == 1):
            raise ConfigError(
                f"rejected_weight {rejected:g} has no effect with relabel {self.mode}, which leaves nothing to weigh "
                "the rejected-goal half against; use relabel both, or remove it."
            )
        return tuple(rejected if origin == REJECTED_GOAL else 1.0 for origin in range(len(ORIGINS)))

    @property
    def conditioned(self) -> bool:
        """Whether any training pair has a goal."""
        return self.origins != (UNCONDITIONED,)

    def takes(self, history: Sequence[Message]) -> bool:
        """Whether a prompt is in the half that is taken; all are, in other modes."""
        if self.mode != "half":
            return True
        return hash_text(f"{self.seed} {hash_turns(history)}") % 2 == 0


class TrainingIndex:
    """Where training pair i comes from: arithmetic over pairs, so that nothing grows with their number.

    The training pairs of pair 0 come first, then those of pair 1, and so on; pairs that tie stand after all others.

    Args:
        pairs: how many do not tie.
        ties: how many tie.
        relabelling: what each becomes.
    """

    def __init__(self, pairs: int, ties: int = 0, relabelling: Relabelling = Relabelling()) -> None:
        self.pairs, self.ties = pairs, ties
        self.origins, self.of_ties = relabelling.origins, relabelling.of_ties

    def __len__(self) -> int:
        return self.pairs * len(self.origins) + self.ties * len(self.of_ties)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(number of the pair, origin) of training pair ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        untied = self.pairs * len(self.origins)
        if index < untied:
            row, place = divmod(index, len(self.origins))
            return row, self.origins[place]
        row, place = divmod(index - untied, len(self.of_ties))
        return self.pairs + row, self.of_ties[place]


def is_tie(pair: Pair, goal: GoalTemplate) -> bool:
    """True where both goals read the same, or neither response has the higher reward (law 2)."""
    if pair.rewards[0] == pair.rewards[1]:
        return True
    first, second = (
        goal.write(*goal.goal_of(r, a)) for r, a in zip(pair.rewards, pair.attributes, strict=True)
    )  # fmt: skip
    return first == second


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
    """One training pair of a scored pair.

    Args:
        pair: the scored pair.
        goal: the template; None writes no goal.
        origin: which half, as an index into :data:`ORIGINS`.

    >>> from rap_lightning import OverallGoal
    >>> pair = Pair("1", ({"role": "user", "content": "2 + 2?"},), ("4", "22"), (9.0, 2.5))
    >>> for origin in (CHOSEN_GOAL, REJECTED_GOAL):  # under the loser's reward, the loser is chosen
    ...     one = relabel(pair, OverallGoal(), origin)
    ...     print(f"goal {one.goal}: {one.chosen!r} beats {one.rejected!r}")
    goal 9: '4' beats '22'
    goal 2.5: '22' beats '4'
    """
    half = REJECTED_GOAL if origin == REJECTED_GOAL else CHOSEN_GOAL
    printed = text = None
    if goal is not None and origin != UNCONDITIONED:
        asked = goal.goal_of(pair.rewards[half], pair.attributes[half])
        printed, text = goal.printed(*asked), goal.write(*asked)
    return RelabelledPair(
        pair_id=pair.id,
        origin=ORIGINS[origin],
        goal=printed,
        goal_text=text,
        history=pair.history,
        chosen=pair.responses[half],
        rejected=pair.responses[1 - half],
        rewards=(pair.rewards[half], pair.rewards[1 - half]),
    )


class RelabelledView(Sequence[RelabelledPair]):
    """The training pairs of scored pairs, without copying them.

    Args:
        pairs: the scored pairs, those marked as ties last.
        goal: the template, or ``None`` for the plain pairs.
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
        if self.goal is not None and origin == REJECTED_GOAL and is_tie(pair, self.goal):
            raise ValueError(f"pair {pair.id} is a tie: both goals read the same")
        return relabel(pair, self.goal, origin)
