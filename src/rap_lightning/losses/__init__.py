"""Direct-alignment losses: small classes over summed log-probabilities. docs/losses.md helps to choose one."""

from rap_lightning.losses.anchored import NCA, APODown, APOZero, SPPOHard
from rap_lightning.losses.base import PreferenceLoss
from rap_lightning.losses.combined import WPO, Mixture
from rap_lightning.losses.divergences import AlphaDPO, ForwardKLDPO, JensenShannonDPO
from rap_lightning.losses.lengths import LDDPO, RDPO, LengthNormalisedDPO
from rap_lightning.losses.margin import DPO, EXO, IPO, DiscoPOP, DPOPositive, Hinge, RobustDPO
from rap_lightning.losses.reference_free import CPO, ORPO, SFT, AlphaPO, SimPO
from rap_lightning.losses.reward_aware import (
    ODPO,
    REBEL,
    DistilledDPO,
    GapLoss,
    GapWeightedDPO,
    MarginDPO,
    RewardAwareLoss,
    RPOBackwardKL,
    RPOForwardKL,
    RPOSquared,
    SoftLabelDPO,
)
from rap_lightning.losses.reward_contrast import InfoNCA, RewardNCA
from rap_lightning.losses.transport import AOT, AOTUnpaired
from rap_lightning.losses.unpaired import BCO, KTO

__all__ = [
    "AOT", "BCO", "CPO", "DPO", "EXO", "IPO", "KTO", "LDDPO", "NCA", "ODPO", "ORPO", "RDPO", "REBEL", "SFT", "WPO",
    "AOTUnpaired", "APODown", "APOZero", "AlphaDPO", "AlphaPO", "DPOPositive", "DiscoPOP", "DistilledDPO",
    "ForwardKLDPO", "GapLoss", "GapWeightedDPO", "Hinge", "InfoNCA", "JensenShannonDPO", "LengthNormalisedDPO",
    "MarginDPO", "Mixture", "PreferenceLoss", "RPOBackwardKL", "RPOForwardKL", "RPOSquared", "RewardAwareLoss",
    "RewardNCA", "RobustDPO", "SPPOHard", "SimPO", "SoftLabelDPO",
]  # fmt: skip
