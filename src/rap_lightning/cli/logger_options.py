"""The options of loggers and trackers: keys, packages, where they write, and the tracked run that they continue."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger

from rap_lightning.callbacks.trackers import BY_NAME, Continued, refuse_file_store, require_installed, tracker_of_class
from rap_lightning.errors import ConfigError
from rap_lightning.provenance import MASK, flatten


def take_secrets_from_environment(options: Namespace, say: Callable[[str], None]) -> None:
    """Let loggers read the keys that a saved config doesn't have (***) from the environment.

    Raises:
        ConfigError: another option is masked.
    """
    for logger in as_list(options["trainer"].get("logger")):
        arguments = logger.get("init_args") or Namespace()
        for name in [name for name, value in vars(arguments).items() if value == MASK]:
            arguments[name] = None
            say(
                f"{name} of {logger['class_path'].rpartition('.')[2]} is not in the saved config: it is read from the "
                "environment, as the tracker's package does (WANDB_API_KEY, COMET_API_KEY)"
            )
    hidden = [name for name, value in flatten(_plain(options)).items() if _has_mask(value)]
    if hidden:
        raise ConfigError(
            f"{hidden[0]} is {MASK} in the config: a run's config.yaml is saved without keys and passwords. Write it "
            "there again, or give its option on the command line."
        )


def _plain(options: Namespace) -> dict[str, Any]:
    """Return options with the list of loggers as a dict by number, so that each has a name."""
    plain: dict[str, Any] = options.as_dict()
    loggers = plain["trainer"].get("logger")
    if isinstance(loggers, list):
        plain["trainer"]["logger"] = {str(number): logger for number, logger in enumerate(loggers)}
    return plain


def _has_mask(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(_has_mask(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and (value == MASK or f"://{MASK}@" in value)


def require_packages(options: Namespace) -> None:
    """Raise ConfigError where the package of a tracker is missing."""
    options["track"] = list(dict.fromkeys(options.get("track") or ()))  # in a config, and again on the command line
    for name in options["track"]:
        require_installed(BY_NAME[name], f"--track {name}")
    for logger in as_list(options["trainer"].get("logger")):
        path = logger.get("class_path") if isinstance(logger, Namespace | dict) else None
        if path and (tracker := tracker_of_class(path)) is not None:
            require_installed(tracker, f"--trainer.logger {path.rpartition('.')[2]}")


def other_folders(options: Namespace) -> list[Path]:
    """Return where a run with these options writes checkpoints, if not below the default root: as a CSVLogger says."""
    loggers = [logger for logger in as_list(options["trainer"].get("logger")) if isinstance(logger, Namespace)]
    named = [
        logger["init_args"].get("save_dir")
        for logger in loggers
        if str(logger.get("class_path")).endswith("CSVLogger") and logger.get("init_args")
    ]
    named.append((options.get("checkpoint") or {}).get("dirpath"))
    return [Path(str(folder)) for folder in named if folder]


def continue_tracked(logger: Any, continued: Continued) -> None:
    """Give a logger the options by which it continues the tracked run of the run that is resumed; its own are kept."""
    tracker = tracker_of_class(logger.get("class_path") or "") if isinstance(logger, Namespace) else None
    arguments = logger.get("init_args") if tracker is not None else None
    if tracker is not None and arguments is not None:
        for name, value in continued.take(tracker).items():
            if name in arguments and arguments[name] is None:
                arguments[name] = value
        if "tracking_uri" in arguments:
            refuse_file_store(arguments["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI"))


def with_metrics_csv(loggers: list[Logger], root: str) -> list[Logger]:
    """Return the loggers, the one of metrics.csv first: its folder is the run's."""
    first = next((logger for logger in loggers if isinstance(logger, CSVLogger)), None)
    return [first or CSVLogger(root, name=""), *(logger for logger in loggers if logger is not first)]


def make_track_repeatable(args: list[str]) -> list[str]:
    """Make ``--track NAME`` repeatable: jsonargparse appends to a list with ``--track+``, and replaces it otherwise."""
    return [
        "--track+" if arg == "--track" and after[:1] not in ("[", "") else
        arg.replace("--track=", "--track+=", 1) if arg.startswith("--track=") and arg[8:9] != "[" else arg
        for arg, after in zip(args, [*args, ""][1:], strict=True)
    ]  # fmt: skip


def as_list(value: Any) -> list[Any]:
    """Return a list of one or many; of none for None and for true and false, which name nothing."""
    return list(value) if isinstance(value, list) else [] if value is None or isinstance(value, bool) else [value]
