"""The arms: what each is trained on, how it is asked, and the settings that are tried, six for each arm."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.losses import DPO, ODPO, SFT, PreferenceLoss, SoftLabelDPO
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal

RATES, BETAS, BETWEEN = (1e-3, 3e-3), (0.1, 0.5), 0.25


@dataclass(frozen=True)
class Trial:
    """One setting: peak learning rate, and the loss's β (of SFT, which has none, the rate alone counts)."""

    lr: float
    beta: float


MARGINS = (*itertools.starmap(Trial, itertools.product(RATES, BETAS)), *(Trial(rate, BETWEEN) for rate in RATES))


@dataclass(frozen=True)
class Arm:
    """One way to train a LoRA adapter on the pairs of a laboratory.

    Attributes:
        title: for tables.
        goal: makes the template; pairs without goals have one too, for its rules about ties.
        loss: of a β.
        data: further options of PreferenceDataModule.
        conditioned: whether it is trained on, and asked for, goals.
        trials: the settings that are tried.
    """

    title: str
    goal: Callable[[], GoalTemplate]
    loss: Callable[[float], PreferenceLoss] = DPO
    data: dict[str, Any] = field(default_factory=dict)
    conditioned: bool = True
    trials: tuple[Trial, ...] = MARGINS

    @property
    def by_strength(self) -> bool:
        """Whether the goal is the adapter's strength, alone or beside a text."""
        return isinstance(self.goal(), AdapterStrength)


def _both() -> GoalTemplate:
    return AdapterStrength(prompt=OverallGoal())


PLAIN, BEST = {"relabel": "none"}, {"best_goal": True}

ARMS: dict[str, Arm] = {
    "dpo": Arm("plain DPO", OverallGoal, data=PLAIN, conditioned=False),
    "text": Arm("goal as text (the paper)", OverallGoal),
    "text+best": Arm("goal as text, best-goal half", OverallGoal, data=BEST),
    "strength": Arm("goal as strength", AdapterStrength),
    "strength+best": Arm("goal as strength, best-goal half", AdapterStrength, data=BEST),
    "both": Arm("text and strength", _both),
    "both+best": Arm("text and strength, best-goal half", _both, data=BEST),
    "sft": Arm("score-conditioned SFT", OverallGoal, lambda beta: SFT(),
               trials=tuple(Trial(lr, 0.0) for lr in (3e-4, 1e-3, 3e-3, 6e-3, 2e-3, 1e-2))),
    "odpo": Arm("ODPO", OverallGoal, ODPO, PLAIN, conditioned=False),
    "strength+soft": Arm("goal as strength, best-goal half, soft labels", AdapterStrength,
                         lambda beta: SoftLabelDPO(beta, temperature=12.0, distance="squared"), BEST),
    "soft": Arm("soft labels", OverallGoal, lambda beta: SoftLabelDPO(beta, temperature=2.0), PLAIN, conditioned=False),
}  # fmt: skip

LONG = ("dpo", "text", "strength", "strength+best")
"""Arms that also run at four times the steps, and with a fifth of the chosen β."""
FRESH = ("dpo", "text", "strength+best", "soft", "strength+soft")
"""Arms of the plan's second part, which run in fresh worlds at one, two and four times the steps."""
