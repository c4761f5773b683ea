"""Figures of a goal-conditioned policy with confidence intervals, from plain arrays. No model, no files.

Every figure is a statistic of observations that belong to prompts. Its uncertainty is that of the prompts: intervals
come from resampling whole prompts (:class:`Bootstrap`), because samples of one prompt say nothing about another.

``statistics`` holds the weighted statistics, ``bootstrap`` the intervals, ``sample_figures`` and ``response_figures``
what is computed from judged samples and from log-probabilities. :mod:`rap_lightning.onpolicy.evaluate` measures both.
"""

from rap_lightning.evaluation.bootstrap import Bootstrap, Figure
from rap_lightning.evaluation.response_figures import Responses, bins_of, discrimination, read_off, unlearning
from rap_lightning.evaluation.sample_figures import Samples, controllability, extrapolation, length

__all__ = [
    "Bootstrap", "Figure", "Responses", "Samples", "bins_of", "controllability", "discrimination", "extrapolation",
    "length", "read_off", "unlearning",
]  # fmt: skip
