"""Lightning callbacks."""

from rap_lightning.callbacks.checkpoint_io import SealedCheckpoints
from rap_lightning.callbacks.checkpoints import Checkpoints
from rap_lightning.callbacks.console import ConsoleLines
from rap_lightning.callbacks.export import ExportHF
from rap_lightning.callbacks.goal_samples import GoalSamples
from rap_lightning.callbacks.guard import Guard
from rap_lightning.callbacks.interrupts import WholeSteps
from rap_lightning.callbacks.likelihood import LikelihoodProbe
from rap_lightning.callbacks.predictions import WritePredictions
from rap_lightning.callbacks.records import RunRecord
from rap_lightning.callbacks.steering import SteeringTable
from rap_lightning.callbacks.watchdog import Watchdog

__all__ = [
    "Checkpoints",
    "ConsoleLines",
    "ExportHF",
    "GoalSamples",
    "Guard",
    "LikelihoodProbe",
    "RunRecord",
    "SealedCheckpoints",
    "SteeringTable",
    "Watchdog",
    "WholeSteps",
    "WritePredictions",
]
