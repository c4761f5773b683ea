"""How large the study is: the real one, and the short one that a test runs."""

from __future__ import annotations

from dataclasses import dataclass

GOALS = (1.0, 2.5, 4.0, 5.5, 7.0, 8.5, 10.0)
"""Goals that samples are drawn at; the last is the best."""
BEYOND = (12.0, 14.5)
"""Goals beyond the scale, for arms that can be asked for them."""
SCALES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
"""Factors on an adapter, for the reward-KL frontier."""
TEMPERATURES = (1.0, 0.7, 0.4, 0.0)
GOOD = 6.0
"""Responses with this score or more are good ones: what becomes of those that lost is the unlearning figure."""


@dataclass(frozen=True)
class Size:
    """Numbers of one study.

    Attributes:
        train_pairs, test_pairs, base_steps: of a world.
        steps, batch: optimizer steps of a run at length 1, and pairs in a step.
        tuning: seeds of the worlds that settings are chosen in.
        seeds: those of the worlds that figures come from; none is a tuning seed.
        samples: responses to each held-out prompt at the best goal and a temperature; half as many elsewhere.
        probed: held-out pairs whose log-probabilities are compared with the base's.
        trials: settings that are tried for an arm.
        arms, long_arms: names of the arms that run, and of those that also run at four times the steps and at a fifth
            of the chosen β; None: all that there are.
    """

    train_pairs: int = 1000
    test_pairs: int = 300
    base_steps: int = 600
    steps: int = 160
    batch: int = 16
    tuning: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    samples: int = 8
    probed: int = 100
    trials: int = 6
    arms: tuple[str, ...] | None = None
    long_arms: tuple[str, ...] | None = None


FULL = Size()
SHORT = Size(
    train_pairs=60, test_pairs=40, base_steps=20, steps=3, batch=4, tuning=(100,), seeds=(1, 2), samples=2, probed=8,
    trials=1, arms=("dpo", "text", "strength+best", "sft"), long_arms=("dpo", "strength+best"),
)  # fmt: skip
