"""Experiment trackers beside metrics.csv: which logger of Lightning's each is, and what it gets besides metrics.

``Tracker`` says what differs between them. ``tracker_of`` finds the one of a logger, ``require_installed`` checks
packages before anything is loaded, and ``tracked`` is what a checkpoint records so that a resumed run continues in the
same tracked runs. ``run_tracking`` has the callback that uses them.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from rap_lightning.errors import ConfigError

PROJECT = "rap-lightning"
"""The project (MLflow's experiment) of runs that name none."""


class Tracker(ABC):
    """What differs between trackers; metrics go through Lightning's logger, in the same way for all.

    Attributes:
        name: what ``--track`` calls it, and the package's extra that installs it.
        packages: modules, one of which must be installed.
        kind: Lightning's logger.
        takes_folders: whether it stores files.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    kind: ClassVar[type[Logger]]
    takes_folders: ClassVar[bool] = True

    @abstractmethod
    def options(self, folder: Path, run: str) -> dict[str, Any]:
        """Return the logger's arguments for a new run that keeps its local files in ``folder``."""

    @abstractmethod
    def identity(self, logger: Any) -> dict[str, Any]:
        """Return the arguments by which another logger continues in the same tracked run."""

    def continued(self, identity: dict[str, Any], step: int) -> dict[str, Any] | None:
        """Return the arguments that continue after ``step``, from a recorded identity; None where it is gone."""
        return identity

    def log_hyperparameters(self, logger: Any, values: dict[str, Any]) -> None:
        """Send flat values by name."""
        logger.log_hyperparams(values)

    @abstractmethod
    def log_table(
        self, logger: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Send a table of texts and numbers."""

    def log_folder(self, logger: Any, folder: Path) -> None:
        """Send a folder of files."""
        raise NotImplementedError(f"{self.name} stores no files")


class Wandb(Tracker):
    """Weights & Biases. Offline with ``WANDB_MODE=offline``."""

    name, packages, kind = "wandb", ("wandb",), WandbLogger

    def options(self, folder: Path, run: str) -> dict[str, Any]:
        return {
            "project": os.environ.get("WANDB_PROJECT", PROJECT), "name": os.environ.get("WANDB_NAME", run),
            "save_dir": os.environ.get("WANDB_DIR", str(folder)),
        }  # fmt: skip

    def identity(self, logger: WandbLogger) -> dict[str, Any]:
        return {"id": logger.version, "project": logger.name}

    def log_table(
        self, logger: WandbLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:  # fmt: skip
        logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)

    def log_folder(self, logger: WandbLogger, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{folder.name}-{logger.version}", type="model")
        artifact.add_dir(str(folder))
        logger.experiment.log_artifact(artifact)


class MLflow(Tracker):
    """MLflow, by default in a database of the run's folder.

    Its file store can't hold both ``loss`` and ``loss/chosen-goal``: it makes a file of the one and a folder of the
    other.
    """

    name, packages, kind = "mlflow", ("mlflow",), MLFlowLogger

    def options(self, folder: Path, run: str) -> dict[str, Any]:
        common = {"experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), "run_name": run}
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return {**common, "tracking_uri": uri}
        here = folder.resolve()
        artifacts = (here / "mlflow-artifacts").as_uri()
        return {**common, "tracking_uri": f"sqlite:///{here / 'mlflow.db'}", "artifact_location": artifacts}

    def identity(self, logger: MLFlowLogger) -> dict[str, Any]:
        uri = logger._tracking_uri  # Lightning 2.6.6 has no public name for it
        # a server's address may hold a password, and is in the environment or in the user's options
        return {"run_id": logger.run_id} | ({"tracking_uri": uri} if uri.startswith("sqlite:") else {})

    def continued(self, identity: dict[str, Any], step: int) -> dict[str, Any] | None:
        uri = identity.get("tracking_uri")
        return identity if uri is None or Path(uri.removeprefix("sqlite:///")).is_file() else None

    def log_hyperparameters(self, logger: MLFlowLogger, values: dict[str, Any]) -> None:
        """Send those that the run doesn't have: MLflow refuses to change one, and a resumed run may be longer."""
        named = {re.sub(r"[^\w\-. :/]", "_", name)[:250]: value for name, value in values.items()}
        had = logger.experiment.get_run(logger.run_id).data.params
        logger.log_hyperparams({name: value for name, value in named.items() if name not in had})

    def log_table(
        self, logger: MLFlowLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:  # fmt: skip
        data = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
        logger.experiment.log_table(logger.run_id, {"step": [step] * len(rows), **data}, f"{name}.json")

    def log_folder(self, logger: MLFlowLogger, folder: Path) -> None:
        logger.experiment.log_artifacts(logger.run_id, str(folder), folder.name)


class TensorBoard(Tracker):
    """TensorBoard's event files, in the run's folder."""

    name, packages, kind = "tensorboard", ("tensorboard", "tensorboardX"), TensorBoardLogger
    takes_folders = False

    def options(self, folder: Path, run: str) -> dict[str, Any]:
        return {"save_dir": str(folder), "name": "tensorboard", "version": ""}

    def identity(self, logger: TensorBoardLogger) -> dict[str, Any]:
        return {"save_dir": os.path.realpath(logger.save_dir), "name": logger.name, "version": logger.version}

    def continued(self, identity: dict[str, Any], step: int) -> dict[str, Any] | None:
        """Drop what was logged after the checkpoint, too: those steps are repeated."""
        return {**identity, "purge_step": step + 1} if Path(identity["save_dir"]).is_dir() else None

    def log_table(
        self, logger: TensorBoardLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:  # fmt: skip
        lines = [columns, ["---"] * len(columns), *rows]
        cells = ([_cell(value) for value in line] for line in lines)
        logger.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)


class Comet(Tracker):
    """Comet. Without a network, ``COMET_START_ONLINE=0`` writes archives to upload later."""

    name, packages, kind = "comet", ("comet_ml",), CometLogger

    def options(self, folder: Path, run: str) -> dict[str, Any]:
        project = os.environ.get("COMET_PROJECT_NAME", PROJECT)
        return {"project": project, "name": run, "offline_directory": str(folder / "comet")}

    def identity(self, logger: CometLogger) -> dict[str, Any]:
        return {"experiment_key": logger.version, "mode": "get"}

    def log_table(
        self, logger: CometLogger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:  # fmt: skip
        headers, data = list(columns), [list(row) for row in rows]
        logger.experiment.log_table(f"{name.replace('/', '-')}-{step}.csv", tabular_data=data, headers=headers)

    def log_folder(self, logger: CometLogger, folder: Path) -> None:
        logger.experiment.log_model(folder.name, str(folder))


TRACKERS: tuple[Tracker, ...] = (Wandb(), MLflow(), TensorBoard(), Comet())
BY_NAME = {tracker.name: tracker for tracker in TRACKERS}


def tracker_of(logger: Any) -> Tracker | None:
    """Return the tracker of a logger; None for metrics.csv, and for loggers that take no tables or folders."""
    return next((tracker for tracker in TRACKERS if isinstance(logger, tracker.kind)), None)


def tracker_of_class(path: str) -> Tracker | None:
    """Return the tracker of a logger's class, by its name or import path."""
    return next((tracker for tracker in TRACKERS if path.rpartition(".")[2] == tracker.kind.__name__), None)


def require_installed(tracker: Tracker, option: str) -> None:
    """Raise ConfigError where a tracker's package is missing."""
    # a folder of that name, such as the wandb/ that runs leave behind, is a package without a file
    if not any((spec := find_spec(name)) is not None and spec.origin is not None for name in tracker.packages):
        raise ConfigError(
            f"{option} needs the package {tracker.packages[0]}, which isn't installed: pip install "
            f"'rap-lightning[{tracker.name}]'"
        )


def takes_folders(loggers: Iterable[Any]) -> bool:
    """Return whether one of the loggers stores files."""
    return any(tracker.takes_folders for logger in loggers if (tracker := tracker_of(logger)) is not None)


def refuse_file_store(uri: str | None) -> None:
    """Raise ConfigError where an MLFlowLogger would write files: see MLflow. Newer releases of MLflow refuse too."""
    if uri is None or uri.startswith(("file:", ".", "/")):
        raise ConfigError(
            f"MLFlowLogger: MLflow's file store ({uri or './mlruns'}) can't hold both loss and loss/chosen-goal. Use "
            "--track mlflow, or give a database or a server: --trainer.logger.tracking_uri sqlite:///mlflow.db"
        )


def tracked(loggers: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the tracked runs of loggers as plain values, for a checkpoint; only in rank zero, which alone logs."""
    found = ((tracker, tracker.identity(logger)) for logger in loggers if (tracker := tracker_of(logger)) is not None)
    return [{"tracker": tracker.name, **identity} for tracker, identity in found]


class Continued:
    """The tracked runs of the run that is resumed, each to be continued once.

    Args:
        records: as ``tracked`` returned them.
        step: of the checkpoint.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]] = (), step: int = 0) -> None:
        self._records, self._step = list(records), step

    def take(self, tracker: Tracker) -> dict[str, Any]:
        """Return the arguments by which a logger continues the earlier run; empty where there is none."""
        for record in self._records:
            if record.get("tracker") == tracker.name:
                self._records.remove(record)
                identity = {name: value for name, value in record.items() if name != "tracker"}
                return tracker.continued(identity, self._step) or {}
        return {}


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")
