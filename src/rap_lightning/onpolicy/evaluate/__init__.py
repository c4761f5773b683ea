"""The goal-conditioned evaluation of a model: what ``rap-lightning evaluate`` does without ``--suite``."""
