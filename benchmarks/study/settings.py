"""How large the study is: in worlds, on a real model, and the short one that a test runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GOALS = (1.0, 2.5, 4.0, 5.5, 7.0, 8.5, 10.0)
BEST_GOAL = GOALS[-1]
Precision = Literal["32-true", "bf16-mixed"]
TEMPERATURES = (1.0, 0.7, 0.4, 0.0)
GOOD = 6.0
"""Responses with this score or more are good ones: what becomes of those that lost is the unlearning figure."""


@dataclass(frozen=True)
class Size:
    """Numbers of one study.

    Attributes:
        task: one of ``judges.TASKS`` for a real instruct model; None: the embedded world.
        model: of a task: its folder or Hub id.
        train_pairs, test_pairs, base_steps: of a world.
        steps, batch: optimizer steps of a run at length 1, and pairs in a step.
        tuning: seeds of the worlds that settings are chosen in.
        seeds: those of the worlds that figures come from; none is a tuning seed. Of a real model, of the training.
        fresh: further ones, added for the claims of the plan's second part alone.
        samples: responses to each held-out prompt at the best goal and a temperature; half as many elsewhere.
        probed: held-out pairs whose log-probabilities are compared with the base's.
        trials: settings that are tried for an arm.
        goals: that samples are drawn at; the last is the best.
        beyond: goals beyond the scale, for arms that can be asked for them.
        rates: factor on all arms' learning rates.
        precision: Lightning's, of the training. Samples and log-probabilities are float32.
        arms, long_arms: names of the arms that run, and of those that also run at four times the steps and at a fifth
            of the chosen β; None: all that there are.
        base_goals: goals, as text, that the base is asked for; None is no goal.
        scales: factors on an adapter, for the reward-KL frontier.
        cap: nats a response up to which areas under frontiers are compared in the plan's second part.
    """

    task: str | None = None
    model: str | None = None
    train_pairs: int = 1000
    test_pairs: int = 300
    base_steps: int = 600
    steps: int = 160
    batch: int = 16
    tuning: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    fresh: tuple[int, ...] = ()
    samples: int = 8
    probed: int = 100
    trials: int = 6
    goals: tuple[float, ...] = GOALS
    beyond: tuple[float, ...] = (12.0, 14.5)
    rates: float = 1.0
    precision: Precision = "32-true"
    arms: tuple[str, ...] | None = None
    long_arms: tuple[str, ...] | None = None
    base_goals: tuple[float | None, ...] = (None, *GOALS)
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
    cap: float = 10.0


FULL = Size(fresh=tuple(range(6, 16)))
REAL = Size(
    steps=48, batch=8, tuning=(100,), seeds=(1, 2, 3), samples=1, trials=3, goals=(1.0, 4.0, 7.0, 10.0), beyond=(12.0,),
    rates=0.3, precision="bf16-mixed", arms=("dpo", "strength+best", "strength+soft", "text"), long_arms=(),
    base_goals=(None,), scales=(0.5, 1.5), cap=20.0,
)  # fmt: skip
SHORT = Size(
    train_pairs=60, test_pairs=40, base_steps=20, steps=3, batch=4, tuning=(100,), seeds=(1, 2), samples=2, probed=8,
    trials=1, arms=("dpo", "text", "strength+best", "sft"), long_arms=("dpo", "strength+best"),
)  # fmt: skip
