"""What a training run recorded about a model: the model it began with, and how it read its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import shown
from rap_lightning.preferences.rules import Rules

if TYPE_CHECKING:
    import torch

ADVICE = "Name it with --base"


class InitialPolicy(ModelSource):
    """The policy of a checkpoint before its first optimizer step.

    It is the recorded model, quantized and scaled as the policy is, with the continued adapter (if any) as loaded.
    """

    is_checkpoint = True

    def __init__(self, checkpoint: ModelSource) -> None:
        super().__init__(checkpoint.path, None, checkpoint.trust_remote_code)
        policy = checkpoint.trained_from()
        self.path = str(policy.get("adapter") or policy["path"])
        altering = ("path", "revision", "adapter", "adapter_revision", "quantize", "rope", "resize_embeddings")
        self._made_of = {name: policy[name] for name in altering if policy.get(name)}

    def identity(self) -> dict[str, Any]:
        """Return the recorded model, and how it was altered."""
        made_of = {name: value for name, value in self._made_of.items() if name != "path"}
        return {"begins with": ModelSource(str(self._made_of["path"])).identity(), "made of": made_of}

    def _load(self, dtype: torch.dtype) -> Any:
        return self._config().load_initial(dtype)


def recorded_base(model: ModelSource) -> ModelSource | str:
    """Return the model that training began with, or why it is unknown.

    The sources in order: a checkpoint's own record, the base that an adapter names, and the config.yaml of the run that
    exported the folder.
    """
    unknown = f"nothing says which model training began with. {ADVICE}"
    if not model.place.exists():
        return unknown
    if model.is_checkpoint:
        found: ModelSource = InitialPolicy(model)
    elif model.is_adapter:
        found = ModelSource(model.adapter_base(), None, model.trust_remote_code)
    else:
        run = run_of(model)
        policy = _section(_section(config_of_run(run) if run is not None else {}, "model"), "policy")
        path = policy.get("adapter") or policy.get("path")
        if run is None or not isinstance(path, str):
            return unknown
        if policy.get("rope"):
            return (
                f"training began with {path} at scaled rotary positions. Evaluate the run's checkpoint, whose base is "
                "scaled alike, or name one with --base"
            )
        beside = start_folder(run) / Path(path).expanduser()  # a relative path is relative to where the run started
        local = Path(path).expanduser().exists() or not beside.exists()
        found = ModelSource(path if local else str(beside), None, model.trust_remote_code)
    may_be_on_hub = found.path.count("/") == 1 and not found.path.startswith((".", "/", "~"))
    if not Path(found.path).expanduser().exists() and not may_be_on_hub:
        return f"training began with {found.path}, which isn't here. {ADVICE}"
    return found


def run_of(model: ModelSource) -> Path | None:
    """Return the folder of the run that wrote a model: RUN for RUN/hf and RUN/checkpoints/x.ckpt."""
    place = model.place.resolve()
    if not place.exists():
        return None
    run = place.parent.parent if model.is_checkpoint and place.parent.name == "checkpoints" else place.parent
    return run if (run / "run.json").is_file() or (run / "config.yaml").is_file() else None


def config_of_run(run: Path) -> dict[str, Any]:
    """Read a run's config.yaml; empty if there is none, or it can't be read."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the options of a section of a config: its ``init_args`` if it names a class."""
    found = config.get(name)
    options = found.get("init_args") or found if isinstance(found, dict) else {}
    return options if isinstance(options, dict) else {}


def start_folder(run: Path) -> Path:
    """Return the working directory that run.json records; the present one without a record."""
    try:
        return Path(json.loads((run / "run.json").read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path()


READ_OPTIONS: dict[str, Any] = {
    "format": Rules.format, "columns": Rules.columns, "outside_scale": Rules.outside_scale, "bad_rows": Rules.bad_rows,
    "thinking": Rules.thinking,
}  # fmt: skip
"""The options that say how rows are read, with their defaults."""


def read_options(
    model: ModelSource, given: dict[str, Any], template: GoalTemplate | None
) -> tuple[dict[str, Any], str | None]:
    """Return how rows are read, and a line that names what was taken from the config.yaml of the model's run.

    Options of the command line override the run's, whose outside_scale is ignored if no reward can be outside.
    """
    run = run_of(model)
    options = _section(config_of_run(run), "data") if run is not None else {}
    taken = {
        name: options[name]
        for name, default in READ_OPTIONS.items() if name not in given and options.get(name, default) != default
    }  # fmt: skip
    if template is None or template.scale.judge_range[0] == float("-inf"):
        taken.pop("outside_scale", None)
    if not taken or run is None:
        return given, None
    listed = ", ".join(f"{k} {value if isinstance(value, str) else shown(value, 200)}" for k, value in taken.items())
    line = f"data are read as the run read its own ({run}/config.yaml): {listed}. An option given here wins."
    if "." in taken.get("format", "") and start_folder(run).resolve() != Path.cwd():
        line += f" {taken['format']} is looked for here; the run was started in {start_folder(run)}."
    return taken | given, line
