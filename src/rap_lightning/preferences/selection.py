"""Make pairs of k scored responses. Choices depend on content and seed only, not on the order of rows."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.pairs import Response

ResponsePair = tuple[Response, Response]
SameGoal = Callable[[Response, Response], bool]
"""Whether the goals of two responses print the same, so that they can't be distinguished."""


class Selection(ABC):
    """Which pairs to make of a prompt's responses. Pass it by import path: ``--data.selection my_pkg.MySelection``.

    >>> class SecondVsLast(Selection):
    ...     def choose(self, ordered, same_goal, rng):
    ...         return [] if same_goal(ordered[1], ordered[-1]) else [(ordered[1], ordered[-1])]
    >>> one, two, three = Response("a", 9.0), Response("b", 7.0), Response("c", 2.0)
    >>> pairs = SecondVsLast().select([three, one, two], lambda r, s: r.reward == s.reward, key="prompt")
    >>> [(better.text, worse.text) for better, worse in pairs]
    [('b', 'c')]
    """

    max_pairs: int | None = None
    seed: int = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def select(self, responses: Sequence[Response], same_goal: SameGoal, key: str) -> list[ResponsePair]:
        """Return pairs of a better and a worse response, best pairs first; none if all goals print the same."""
        # equal rewards are sorted by text, so that the order of responses has no effect
        ordered = sorted(responses, key=lambda r: (-r.reward, r.text))
        pairs = list(self.choose(ordered, same_goal, random.Random(f"{self.seed} {key}")))
        if self.max_pairs is not None and len(pairs) > self.max_pairs:
            kept = sorted(random.Random(f"{self.seed} max {key}").sample(range(len(pairs)), self.max_pairs))
            pairs = [pairs[i] for i in kept]
        return pairs

    @abstractmethod
    def choose(self, ordered: Sequence[Response], same_goal: SameGoal, rng: random.Random) -> Iterable[ResponsePair]:
        """Return pairs of (better, worse) among responses ordered from the highest reward to the lowest."""


class BestVsRandom(Selection):
    """The best response against a random one of the others, as in the paper.

    Args:
        seed: of the random choice.

    >>> responses = [Response("a", 9.0), Response("b", 9.0), Response("c", 2.0)]
    >>> pairs = BestVsRandom().select(responses, lambda r, s: r.reward == s.reward, key="prompt")
    >>> [(better.text, worse.text) for better, worse in pairs]  # b has the same goal as a
    [('a', 'c')]
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, ordered: Sequence[Response], same_goal: SameGoal, rng: random.Random) -> Iterable[ResponsePair]:
        worse = [other for other in ordered[1:] if not same_goal(ordered[0], other)]
        return [(ordered[0], rng.choice(worse))] if worse else []


class BestVsWorst(Selection):
    """The best response against the worst.

    >>> responses = [Response("a", 2.0), Response("b", 9.0), Response("c", 7.0)]
    >>> pairs = BestVsWorst().select(responses, lambda r, s: r.reward == s.reward, key="prompt")
    >>> [(better.text, worse.text) for better, worse in pairs]
    [('b', 'a')]
    """

    def choose(self, ordered: Sequence[Response], same_goal: SameGoal, rng: random.Random) -> Iterable[ResponsePair]:
        return [] if same_goal(ordered[0], ordered[-1]) else [(ordered[0], ordered[-1])]


class SeveralPairs(Selection):
    """More than one pair per prompt.

    Args:
        max_pairs: at most this many pairs per prompt, chosen at random; null keeps all.
        seed: of the random choice.
    """

    def __init__(self, max_pairs: int | None = None, seed: int = 0) -> None:
        if max_pairs is not None and max_pairs < 1:
            raise ConfigError(f"selection: max_pairs must be at least 1, found {max_pairs}")
        self.max_pairs, self.seed = max_pairs, seed


class AllPairs(SeveralPairs):
    """Every two responses.

    >>> responses = [Response("a", 2.0), Response("b", 9.0), Response("c", 7.0)]
    >>> pairs = AllPairs().select(responses, lambda r, s: r.reward == s.reward, key="prompt")
    >>> [(better.text, worse.text) for better, worse in pairs]
    [('b', 'c'), ('b', 'a'), ('c', 'a')]
    """

    def choose(self, ordered: Sequence[Response], same_goal: SameGoal, rng: random.Random) -> Iterable[ResponsePair]:
        for i, better in enumerate(ordered):
            for worse in ordered[i + 1 :]:
                if not same_goal(better, worse):
                    yield better, worse


class AdjacentPairs(SeveralPairs):
    """Every response against the next worse one.

    >>> responses = [Response("a", 2.0), Response("b", 9.0), Response("c", 7.0)]
    >>> pairs = AdjacentPairs().select(responses, lambda r, s: r.reward == s.reward, key="prompt")
    >>> [(better.text, worse.text) for better, worse in pairs]
    [('b', 'c'), ('c', 'a')]
    """

    def choose(self, ordered: Sequence[Response], same_goal: SameGoal, rng: random.Random) -> Iterable[ResponsePair]:
        """Return up to k - 1 pairs; of responses with the same goal the first by text is used."""
        distinct = list(ordered[:1])
        for response in ordered[1:]:
            if not same_goal(distinct[-1], response):
                distinct.append(response)
        return list(pairwise(distinct))
