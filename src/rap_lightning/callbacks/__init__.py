"""Lightning callbacks."""

from rap_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from rap_lightning.callbacks.checkpointing import Checkpoints
from rap_lightning.callbacks.console_lines import ConsoleLines
from rap_lightning.callbacks.export_hf import ExportHF
from rap_lightning.callbacks.goal_margins import GoalMargins
from rap_lightning.callbacks.goal_samples import GoalSamples
from rap_lightning.callbacks.guard import Guard
from rap_lightning.callbacks.likelihood_probe import LikelihoodProbe
from rap_lightning.callbacks.predictions import WritePredictions
from rap_lightning.callbacks.run_record import RunRecord
from rap_lightning.callbacks.signals import WholeSteps
from rap_lightning.callbacks.steering_table import SteeringTable
from rap_lightning.callbacks.watchdog import Watchdog

__all__ = [
    "AtomicCheckpointIO", "Checkpoints", "ConsoleLines", "ExportHF", "GoalMargins", "GoalSamples", "Guard",
    "LikelihoodProbe", "RunRecord", "SteeringTable", "Watchdog", "WholeSteps", "WritePredictions",
]  # fmt: skip
