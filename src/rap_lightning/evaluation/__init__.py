"""What a goal-conditioned policy is measured by: figures with intervals, from plain arrays. No model, no files.

Everything is a statistic of observations that belong to prompts. Its uncertainty is that of the prompts: intervals come
from resampling whole prompts (:class:`Bootstrap`), since samples of one prompt are no news about another.
"""

from rap_lightning.evaluation.estimates import Bootstrap, Figure
from rap_lightning.evaluation.likelihoods import Responses, bins_of, discrimination, read_off, unlearning
from rap_lightning.evaluation.samples import Samples, controllability, extrapolation, length

__all__ = [
    "Bootstrap",
    "Figure",
    "Responses",
    "Samples",
    "bins_of",
    "controllability",
    "discrimination",
    "extrapolation",
    "length",
    "read_off",
    "unlearning",
]
