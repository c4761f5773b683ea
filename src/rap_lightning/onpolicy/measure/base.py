"""Which model a policy was trained from, as far as its files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rap_lightning.onpolicy.model import Model

ADVICE = "Name it with --base."


def recorded_base(model: Model) -> str | None:
    """Where the model that training began with lies; None where nothing says so.

    A checkpoint's own record comes first, then what an adapter names, then the config.yaml of the run that exported
    the folder.
    """
    if model.is_checkpoint:
        return _of_policy(model.trained_from(), Path())
    if model.is_adapter:
        return model.adapter_base()
    run = run_of(model)
    if run is None:
        return None
    config = _config(run / "config.yaml")
    section = config.get("model", {})
    options = section.get("init_args", section) if isinstance(section, dict) else {}
    policy = options.get("policy") if isinstance(options, dict) else None
    return _of_policy(policy, _started_in(run)) if isinstance(policy, dict) else None


def run_of(model: Model) -> Path | None:
    """The folder of the run that a model was written by: RUN of RUN/hf and of RUN/checkpoints/x.ckpt."""
    place = model.place.resolve()
    if not place.exists():
        return None
    run = place.parent.parent if model.is_checkpoint and place.parent.name == "checkpoints" else place.parent
    return run if (run / "run.json").is_file() or (run / "config.yaml").is_file() else None


def _of_policy(policy: dict[str, Any], started_in: Path) -> str | None:
    path = policy.get("adapter") or policy.get("path")
    if not isinstance(path, str):
        return None
    here = Path(path).expanduser()
    beside = started_in / here
    return str(beside) if not here.exists() and beside.exists() else path


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _started_in(run: Path) -> Path:
    try:
        return Path(json.loads((run / "run.json").read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path()
