"""Goals that no training pair states: a scale that was declared wider than the judge's, or forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from rap_lightning.preferences.data_report import DataReport, wider
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import RewardScale


def never_stated(rules: Rules, reports: Sequence[DataReport]) -> str | None:
    """What to say where the best goal, which is asked for at inference, is stated by no pair of the training split.

    Args:
        rules: the pairs were made by; their scale must be a declared one, since others are fitted to the rewards.
        reports: of all sources of the split.
    """
    goal, seen = rules.goal, None
    for report in reports:
        seen = wider(seen, report.rewards)
    if goal is None or seen is None or type(goal.scale) is not RewardScale or not rules.relabelling.conditioned:
        return None
    low, high, scale = *seen, goal.scale
    if goal.write(scale.goal(high), goal.best_attributes) == goal.write(goal.best, goal.best_attributes):
        return None
    best, highest = scale.printed(goal.best), scale.printed(high)
    return (
        f"note: no reward is above {high:g} on the scale from {scale.low:g} to {scale.high:g} (the lowest is {low:g}), "
        f"so the best goal, {best}, is never trained on. If the judge's scale ends earlier, declare it with "
        f"goal.scale.high; if the judge only gives no more, ask for {highest} instead of {best}."
    )
