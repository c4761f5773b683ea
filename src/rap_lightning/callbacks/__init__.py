"""Lightning callbacks."""

from rap_lightning.callbacks.checkpoints import Checkpoints
from rap_lightning.callbacks.console import ConsoleLines
from rap_lightning.callbacks.export import ExportHF
from rap_lightning.callbacks.interrupts import WholeSteps
from rap_lightning.callbacks.predictions import WritePredictions
from rap_lightning.callbacks.records import RunRecord
from rap_lightning.callbacks.steering import SteeringTable

__all__ = ["Checkpoints", "ConsoleLines", "ExportHF", "RunRecord", "SteeringTable", "WholeSteps", "WritePredictions"]
