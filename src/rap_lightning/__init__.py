"""rap-lightning: reward-augmented preference alignment on Lightning.

The public names below are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rap_lightning.datamodule import PreferenceDataModule
    from rap_lightning.losses import DPO, Hinge, PreferenceLoss, SimPO
    from rap_lightning.models.guidance import GoalGuidance
    from rap_lightning.models.references.adapters_off import AdaptersOff
    from rap_lightning.models.references.base import NoReference
    from rap_lightning.models.references.frozen import Frozen
    from rap_lightning.models.references.policy_copy import AdapterAsLoaded
    from rap_lightning.models.references.precomputed import Stored
    from rap_lightning.models.references.synchronised import Synchronised
    from rap_lightning.module import PreferenceModule
    from rap_lightning.preferences.adapter_strength import AdapterStrength
    from rap_lightning.preferences.filters import Filters
    from rap_lightning.preferences.goals import AttributeGoal, GoalTemplate, OverallGoal
    from rap_lightning.preferences.relabelling import RelabelledView, relabel
    from rap_lightning.preferences.scales import LinearScale, QuantileScale, RewardScale
    from rap_lightning.preferences.selection import AdjacentPairs, AllPairs, BestVsRandom, BestVsWorst, Selection
    from rap_lightning.preferences.sources import Source

_HOMES = {
    "PreferenceDataModule": "datamodule",
    "PreferenceModule": "module",
    "PreferenceLoss": "losses",
    "DPO": "losses",
    "Hinge": "losses",
    "SimPO": "losses",
    "AdapterAsLoaded": "models.references.policy_copy",
    "AdapterStrength": "preferences.adapter_strength",
    "AdaptersOff": "models.references.adapters_off",
    "Frozen": "models.references.frozen",
    "NoReference": "models.references.base",
    "GoalGuidance": "models.guidance",
    "AttributeGoal": "preferences.goals",
    "Synchronised": "models.references.synchronised",
    "Stored": "models.references.precomputed",
    "GoalTemplate": "preferences.goals",
    "OverallGoal": "preferences.goals",
    "LinearScale": "preferences.scales",
    "QuantileScale": "preferences.scales",
    "RewardScale": "preferences.scales",
    "AdjacentPairs": "preferences.selection",
    "AllPairs": "preferences.selection",
    "BestVsRandom": "preferences.selection",
    "BestVsWorst": "preferences.selection",
    "Selection": "preferences.selection",
    "Filters": "preferences.filters",
    "Source": "preferences.sources",
    "RelabelledView": "preferences.relabelling",
    "relabel": "preferences.relabelling",
}

__all__ = [
    "DPO",
    "AdapterAsLoaded",
    "AdapterStrength",
    "AdaptersOff",
    "AdjacentPairs",
    "AllPairs",
    "AttributeGoal",
    "BestVsRandom",
    "BestVsWorst",
    "Filters",
    "Frozen",
    "GoalGuidance",
    "GoalTemplate",
    "Hinge",
    "LinearScale",
    "NoReference",
    "OverallGoal",
    "PreferenceDataModule",
    "PreferenceLoss",
    "PreferenceModule",
    "QuantileScale",
    "RelabelledView",
    "RewardScale",
    "Selection",
    "SimPO",
    "Source",
    "Stored",
    "Synchronised",
    "relabel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
