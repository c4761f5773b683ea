"""Goals to ask a trained policy for: from the lowest to the highest of a scale."""

from __future__ import annotations

from collections.abc import Sequence

from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.scales import RewardScale


def grid(scale: RewardScale, count: int) -> list[float]:
    """Goals evenly from the scale's lowest to its highest number, as they are printed; fewer where some print alike.

    >>> grid(RewardScale(), 7)
    [1.0, 2.5, 4.0, 5.5, 7.0, 8.5, 10.0]
    """
    step = (scale.high - scale.low) / max(count - 1, 1)
    printed = [scale.printed(scale.low + step * i) for i in range(count)]
    return [float(text) for text in dict.fromkeys(printed)]


def asked_at(template: GoalTemplate, goal: float) -> tuple[float, tuple[float, ...]]:
    """The goal with its attributes as high on their own scale as it is on the overall one.

    Args:
        template: how goals read.
        goal: on the scale that goals state.
    """
    scale = template.scale
    own = getattr(template, "attribute_scale", scale)
    share = (goal - scale.low) / (scale.high - scale.low)
    return goal, (own.low + share * (own.high - own.low),) * len(template.attributes)


def text_at(template: GoalTemplate, goal: float) -> str:
    """What the template says of a goal, its attributes as in :func:`asked_at`."""
    return template.write(*asked_at(template, goal))


def own_texts(template: GoalTemplate, rewards: Sequence[float], attributes: Sequence[Sequence[float]]) -> list[str]:
    """What the template says of each response's own rewards: the goal under which it is the right answer."""
    return [template.write(*template.goal_of(r, a)) for r, a in zip(rewards, attributes, strict=True)]
