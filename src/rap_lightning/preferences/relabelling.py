"""The paper's relabelling: one scored pair becomes two goal-conditioned pairs.

Under goal g the implied reward of a response is -(g - r)^2 (arXiv 2410.08067, section 4), so each of the two responses
wins under its own reward as the goal. With responses numbered 0 (winner) and 1 (loser), the half numbered h has

    goal = rewards[h],   chosen = responses[h],   rejected = responses[1 - h]

so N pairs become 2N by index arithmetic, and no row is copied or edited. A pair has a winner under every other goal
too: under the best one it is response 0 (origin ``best-goal``), and under any goal g the response whose reward is
nearer, since (g - r_l)^2 - (g - r_w)^2 = 2 (r_w - r_l) (g - (r_w + r_l) / 2) changes its sign at the midpoint alone.
So goals may be drawn from the whole scale (origins ``upper-goal`` and ``lower-goal``).

Read in this order: :data:`ORIGIN_TABLE`, the kinds of training pair; :class:`Relabelling`, which of them a scored pair
becomes; :func:`draw_goals`, the drawn ones; :func:`relabel`, one training pair as text; :class:`RelabelledView`, all of
them as a sequence.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.goals import GoalTemplate, StatedGoal
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import Message, Pair


@dataclass(frozen=True)
class Origin:
    """One way to make a training pair of a scored pair.

    Attributes:
        name: in metrics and exported data.
        goal: ``own`` is the reward of the chosen response, ``best`` the highest goal, ``drawn`` one of the whole scale;
            None writes no goal.
        chosen: number of the response that is chosen: 0 the winner, 1 the loser.
        description: for the card of exported data.
    """

    name: str
    goal: Literal["own", "best", "drawn"] | None
    chosen: int
    description: str


ORIGIN_TABLE = (
    Origin("chosen-goal", "own", 0, "the winner's reward is the goal, and the winner is chosen"),
    Origin("rejected-goal", "own", 1, "the loser's reward is the goal, and the loser is chosen"),
    Origin("unconditioned", None, 0, "no goal, the winner is chosen"),
    Origin("best-goal", "best", 0, "the best goal, and the winner is chosen"),
    Origin("upper-goal", "drawn", 0, "a drawn goal nearer to the winner's reward, and the winner is chosen"),
    Origin("lower-goal", "drawn", 1, "a drawn goal nearer to the loser's reward, and the loser is chosen"),
)
"""The kinds of training pair. A batch holds indices into this table."""

CHOSEN_GOAL, REJECTED_GOAL, UNCONDITIONED, BEST_GOAL, UPPER_GOAL, LOWER_GOAL = range(6)

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
    best_goal: bool = False
    goals_per_pair: int = 0

    def __post_init__(self) -> None:
        if self.goals_per_pair < 0:
            raise ConfigError(f"goals_per_pair must be at least 0, found {self.goals_per_pair}")
        if self.mode == "none" and self.keep_original:
            raise ConfigError("keep_original has no effect with relabel none, which keeps the originals alone.")
        for option, given in (("best_goal", self.best_goal), ("goals_per_pair", self.goals_per_pair)):
            if self.mode == "none" and given:
                raise ConfigError(f"{option} has no effect with relabel none, which states no goal. Use relabel both.")

    @classmethod
    def of(
        cls, mode: Mode | None, goal: GoalTemplate | None, keep_original: bool, seed: int, best_goal: bool = False,
        goals_per_pair: int = 0,
    ) -> Relabelling:  # fmt: skip
        """Return the relabelling for options; a ``mode`` of None is ``both`` with a goal and ``none`` without one."""
        return cls(mode or ("none" if goal is None else "both"), keep_original, seed, best_goal, goals_per_pair)

    @property
    def origins(self) -> tuple[int, ...]:
        """What scored pairs become, as indices into :data:`ORIGIN_TABLE`."""
        conditioned = CONDITIONED[self.mode] + ((BEST_GOAL,) if self.best_goal else ())
        conditioned += (UPPER_GOAL, LOWER_GOAL) if self.goals_per_pair else ()
        return conditioned if conditioned and not self.keep_original else (*conditioned, UNCONDITIONED)

    @property
    def of_ties(self) -> tuple[int, ...]:
        """What a pair becomes whose goals print the same: never both halves, because they would contradict each other.

        This is law 2 (docs/invariants.md). As its goals don't tell its responses apart, none is the better one under
        another goal either.
        """
        return tuple(one for one in self.origins if one in (CHOSEN_GOAL, UNCONDITIONED))

    def made_of(self, pair: Pair, goal: GoalTemplate | None) -> tuple[Made, ...]:
        """Return what this pair becomes: without what law 2, :func:`repeats_best` and :func:`draw_goals` rule out."""
        if pair.tie:
            return tuple(map(Made, self.of_ties))
        repeated = self.best_goal and goal is not None and repeats_best(pair, goal, self)
        left_out = {UPPER_GOAL, LOWER_GOAL} | ({BEST_GOAL} if repeated else set())
        made = tuple(Made(one) for one in self.origins if one not in left_out)
        return made + draw_goals(pair, goal, self).made if self.goals_per_pair and goal is not None else made

    def weights(self, rejected: float = 1.0, best: float = 1.0) -> tuple[float, ...]:
        """Return the loss weight of a training pair of each entry of :data:`ORIGIN_TABLE`.

        Args:
            rejected: weight of pairs whose loser is chosen: the rejected-goal half, and drawn goals near the loser.
            best: weight of the best-goal half; all others have weight 1.

        Raises:
            ConfigError: one is not above 0 and finite, or there is nothing to weigh its half against.
        """
        found = [1.0] * len(ORIGIN_TABLE)
        for option, weight, weighed, without, use in (
            ("rejected_weight", rejected, {REJECTED_GOAL, LOWER_GOAL}, "relabel chosen", "relabel both"),
            ("best_goal_weight", best, {BEST_GOAL}, "best_goal false", "best_goal true"),
        ):
            half, made = ORIGINS[min(weighed)], set(self.origins)
            if weight == 0:
                raise ConfigError(f"{option} 0 leaves out the {half} half: that is {without}.")
            if not 0 < weight < float("inf"):
                raise ConfigError(f"{option} must be above 0 and finite, found {weight}")
            if weight != 1 and (not weighed & made or made <= weighed):
                raise ConfigError(
                    f"{option} {weight:g} has no effect with relabel {self.mode}, which leaves nothing to weigh "
                    f"the {half} half against. Use {use}, or remove it."
                )
            for origin in weighed:
                found[origin] = weight
        return tuple(found)

    @property
    def conditioned(self) -> bool:
        return self.origins != (UNCONDITIONED,)

    def takes(self, history: Sequence[Message]) -> bool:
        """Return whether a prompt is used: in mode ``half`` a seeded half of them, in other modes all."""
        if self.mode != "half":
            return True
        return hash_text(f"{self.seed} {hash_turns(history)}") % 2 == 0


class Made(NamedTuple):
    """What a scored pair becomes once.

    Attributes:
        origin: index into :data:`ORIGIN_TABLE`.
        drawn: the reward that a drawn goal asks for, in the judge's units; nan for other goals.
    """

    origin: int
    drawn: float = math.nan


class TrainingIndex:
    """Map training pair i to its scored pair and its place among that one's, from the origins of each scored pair.

    The training pairs of pair 0 come first, then those of pair 1, and so on. Five bytes a training pair are held.

    Args:
        origins: of each scored pair, what it becomes.
    """

    def __init__(self, origins: Iterable[Sequence[int]]) -> None:
        self.rows, self.origins = array("i"), array("b")
        for row, made in enumerate(origins):
            self.rows.extend([row] * len(made))
            self.origins.extend(made)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[index]
        return row, index - bisect.bisect_left(self.rows, row)


def is_tie(goal: GoalTemplate | None, rewards: tuple[float, float], attributes: Sequence[Sequence[float]]) -> bool:
    """Return whether both goals read the same, or neither response has the higher reward (law 2)."""
    if goal is None or rewards[0] == rewards[1]:
        return rewards[0] == rewards[1]
    first, second = goal.own_goals(rewards, attributes)
    return first == second


def repeats_best(pair: Pair, goal: GoalTemplate, relabelling: Relabelling) -> bool:
    """Return whether a pair's best goal reads like a goal under which it is trained on already.

    The winner's own goal may be the best: the same training pair would be trained on twice. The loser's own goal may
    read like the best one (with attributes): the two would contradict each other (law 2).
    """
    own = goal.own_goals(pair.rewards, pair.attributes)
    return any(own[ORIGIN_TABLE[origin].chosen] == goal.state_best for origin in CONDITIONED[relabelling.mode])


MIDWAY = "no pair under a drawn goal: both rewards are about as far from it"
READS_ALIKE = "no pair under a drawn goal: the pair has one under a goal that reads the same"


class Draws(NamedTuple):
    """What a pair's drawn goals gave: training pairs, and the reasons of those that were left out."""

    made: tuple[Made, ...]
    left_out: tuple[str, ...]


def draw_goals(pair: Pair, goal: GoalTemplate, relabelling: Relabelling) -> Draws:
    """Draw goals for a pair, uniformly from those that the scale can print, and label each with the nearer response.

    Draw j depends on the seed, the pair's id and j alone. The nearer response must be the same in the judge's units, in
    which losses measure distances, and in the numbers that goals state, which may map them otherwise. Left out are a
    goal that reads like the midpoint, and one that reads like another goal under which the pair is trained on (law 2).
    """
    scale = goal.scale
    r_w, r_l = pair.rewards
    g_w, g_l = scale.goal(r_w), scale.goal(r_l)
    own = goal.own_goals(pair.rewards, pair.attributes)
    taken = [own[ORIGIN_TABLE[origin].chosen] for origin in CONDITIONED[relabelling.mode]]
    taken += [goal.state_best] if relabelling.best_goal else []
    midway = [goal.state_at(middle) for middle in (scale.goal((r_w + r_l) / 2), (g_w + g_l) / 2)]
    made: list[Made] = []
    left_out = []
    for j in range(relabelling.goals_per_pair):
        share = hash_text(f"{relabelling.seed} {pair.id} {j}") / 2**64
        reward = scale.reward(scale.printable(share))
        asked = scale.goal(reward)
        stated = goal.state_at(asked)
        above = {near > 0 for near in (abs(asked - g_l) - abs(asked - g_w), abs(reward - r_l) - abs(reward - r_w))}
        if stated in midway or len(above) > 1:
            left_out.append(MIDWAY)
        elif stated in taken:
            left_out.append(READS_ALIKE)
        else:
            taken.append(stated)
            made.append(Made(UPPER_GOAL if above == {True} else LOWER_GOAL, reward))
    return Draws(tuple(made), tuple(left_out))


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
        goal_reward: the reward that the goal asks for, in the judge's units; nan for an unconditioned pair.
        strength: factor on the policy's adapter under this goal; None leaves the adapter as it is.
    """

    pair_id: str
    origin: str
    goal: str | None
    goal_text: str | None
    history: tuple[Message, ...]
    chosen: str
    rejected: str
    rewards: tuple[float, float]
    goal_reward: float
    strength: float | None = None


def relabel(pair: Pair, goal: GoalTemplate | None, origin: int, drawn: float = math.nan) -> RelabelledPair:
    """Return one training pair of a scored pair.

    Args:
        pair: the scored pair.
        goal: the template; None writes no goal.
        origin: index into :data:`ORIGIN_TABLE`.
        drawn: the reward that a drawn goal asks for, in the judge's units; other origins ignore it.

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
    printed, stated, reward = None, StatedGoal(), math.nan
    if goal is not None and made.goal is not None:
        if made.goal == "own":
            asked, reward = goal.goal_of(pair.rewards[half], pair.attributes[half]), pair.rewards[half]
        elif made.goal == "drawn":
            asked, reward = goal.with_attributes(goal.scale.goal(drawn)), drawn
        else:  # a mapped scale states rewards beyond its end as that end: the winner is never farther from the best
            asked, reward = (goal.best, goal.best_attributes), max(goal.scale.best_reward, pair.rewards[0])
        printed, stated = goal.printed(*asked), goal.state(*asked)
    return RelabelledPair(
        pair_id=pair.id,
        origin=made.name,
        goal=printed,
        goal_text=stated.text,
        history=pair.history,
        chosen=pair.responses[half],
        rejected=pair.responses[1 - half],
        rewards=(pair.rewards[half], pair.rewards[1 - half]),
        goal_reward=reward,
        strength=stated.strength,
    )


class RelabelledView(Sequence[RelabelledPair]):
    """A sequence of the training pairs of scored pairs, without copying them.

    Args:
        pairs: the scored pairs.
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
        self.relabelling = relabelling
        self._places = TrainingIndex([made.origin for made in relabelling.made_of(pair, goal)] for pair in pairs)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> RelabelledPair:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row, place = self._places[index % len(self)]
        pair = self.pairs[row]
        origin, drawn = self.relabelling.made_of(pair, self.goal)[place]
        if self.goal is not None and origin == REJECTED_GOAL and is_tie(self.goal, pair.rewards, pair.attributes):
            raise ValueError(f"pair {pair.id} is a tie: both goals read the same")
        return relabel(pair, self.goal, origin, drawn)
