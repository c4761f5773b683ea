"""How large the study is: the real one, and the short one that tests run."""

from __future__ import annotations

from dataclasses import dataclass

#: Goals that are asked for when samples are drawn; the last is the best.
GOALS = (1.0, 2.5, 4.0, 5.5, 7.0, 8.5, 10.0)
#: Rewards by which responses are told apart in the likelihood probe, [low, high).
BINS = ((1.0, 4.0), (4.0, 6.0), (6.0, 10.01))
#: Tokens of prompt and response together; nothing is cut (a test holds it to that).
MAX_LENGTH = 224


@dataclass(frozen=True)
class Size:
    """Numbers of one study.

    Attributes:
        train_pairs, test_pairs: scored pairs of a world, ties included.
        base_steps: optimizer steps of a base model.
        steps: optimizer steps of every run, but where an arm says otherwise.
        batch: pairs in a step.
        tuning: seeds of the worlds in which settings are chosen.
        more_tuning: worlds that settings are chosen in as well, to see what hangs on the choice of the first.
        seeds: those of the worlds that figures come from; none is a tuning seed.
        knob_seeds: how many of these the dose-response uses.
        samples: responses to each held-out prompt, without a goal and at the best one.
        samples_between: the same, at the goals between.
        probed: held-out pairs whose log-probabilities are compared with the base's.
        read: responses whose score is read off the policy.
        arms, knobs: names of those that there are; None: all.
        trials: settings that are tried for an arm, the first of its list.
    """

    train_pairs: int = 1000
    test_pairs: int = 300
    base_steps: int = 600
    steps: int = 160
    batch: int = 16
    tuning: tuple[int, ...] = (100,)
    more_tuning: tuple[int, ...] = (101, 102)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    knob_seeds: int = 3
    samples: int = 16
    samples_between: int = 4
    probed: int = 100
    read: int = 80
    arms: tuple[str, ...] | None = None
    knobs: tuple[str, ...] | None = None
    trials: int = 4


FULL = Size()
SHORT = Size(
    more_tuning=(),
    train_pairs=60, test_pairs=40, base_steps=20, steps=4, batch=4, seeds=(1, 2), knob_seeds=1,
    samples=1, samples_between=1, probed=8, read=8, trials=1, knobs=("noise 2",),
    arms=("dpo", "ra", "sft", "never-swapped", "ra-sft", "warm", "weight", "gap", "original", "ira"),
)  # fmt: skip
