"""Direct-alignment losses: small classes over summed log-probabilities."""

from rap_lightning.losses.base import PreferenceLoss
from rap_lightning.losses.reference_based import DPO, Hinge
from rap_lightning.losses.reference_free import SimPO

__all__ = ["DPO", "Hinge", "PreferenceLoss", "SimPO"]
