"""From runs to pictures: each part of the page, where its files are there, and how to get it where they aren't."""

from rap_lightning.reporting.parts.base import Part, evaluate_command
from rap_lightning.reporting.parts.extrapolation import discrimination, extrapolation, length
from rap_lightning.reporting.parts.goal_steering import steering
from rap_lightning.reporting.parts.training import training
from rap_lightning.reporting.parts.unlearning import unlearning
from rap_lightning.reporting.read_runs import Run

__all__ = ["Part", "all_parts", "evaluate_command"]


def all_parts(runs: list[Run]) -> list[Part]:
    """In the order of the page."""
    makers = (steering, training, unlearning, extrapolation, discrimination, length)
    return [make(runs) for make in makers]
