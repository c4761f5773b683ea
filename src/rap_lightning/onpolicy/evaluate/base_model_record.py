"""Which model a policy was trained from, as far as its files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rap_lightning.onpolicy.sampled_model import Model

ADVICE = "Name it with --base"


class Beginning(Model):
    """What the policy of a checkpoint was before the first step: the recorded model with all that was done to it.

    Quantised and scaled as the policy is, with the adapter that was continued, if any, as it was loaded.

    Args:
        checkpoint: of fit.
    """

    is_checkpoint = True

    def __init__(self, checkpoint: Model) -> None:
        super().__init__(checkpoint.path, None, checkpoint.trust_remote_code)
        policy = checkpoint.trained_from()
        self.path = str(policy.get("adapter") or policy["path"])
        altering = ("path", "revision", "adapter", "adapter_revision", "quantize", "rope", "resize_embeddings")
        self._made_of = {name: policy[name] for name in altering if policy.get(name)}

    def load(self, dtype: Any, device: Any) -> Any:
        """The causal LM in evaluation mode."""
        return self._config().load_initial(dtype).to(device).eval()

    def identity(self) -> dict[str, Any]:
        """The recorded model, and what was done to it."""
        made_of = {name: value for name, value in self._made_of.items() if name != "path"}
        return {"begins with": Model(str(self._made_of["path"])).identity(), "made of": made_of}


def recorded_base(model: Model) -> Model | str:
    """The model that training began with; in words why that can't be known.

    A checkpoint's own record comes first, then what an adapter names, then the config.yaml of the run that exported
    the folder.
    """
    if not model.place.exists():
        return f"nothing says which model training began with. {ADVICE}"
    if model.is_checkpoint:
        found: Model = Beginning(model)
    elif model.is_adapter:
        found = Model(model.adapter_base(), None, model.trust_remote_code)
    else:
        run = run_of(model)
        policy = _policy_of(config_of_run(run)) if run is not None else {}
        path = policy.get("adapter") or policy.get("path")
        if run is None or not isinstance(path, str):
            return f"nothing says which model training began with. {ADVICE}"
        if policy.get("rope"):
            return (
                f"training began with {path} at scaled rotary positions. Evaluate the run's checkpoint, whose base is "
                "scaled alike, or name one with --base"
            )
        found = Model(_found(path, started_in(run)), None, model.trust_remote_code)
    if not Path(found.path).expanduser().exists() and not _on_hub(found.path):
        return f"training began with {found.path}, which isn't here. {ADVICE}"
    return found


def run_of(model: Model) -> Path | None:
    """The folder of the run that a model was written by: RUN of RUN/hf and of RUN/checkpoints/x.ckpt."""
    place = model.place.resolve()
    if not place.exists():
        return None
    run = place.parent.parent if model.is_checkpoint and place.parent.name == "checkpoints" else place.parent
    return run if (run / "run.json").is_file() or (run / "config.yaml").is_file() else None


def _found(path: str, started_in: Path) -> str:
    """A path as it is, or as it was where the run was started."""
    here = Path(path).expanduser()
    beside = started_in / here
    return str(beside) if not here.exists() and beside.exists() else path


def _on_hub(path: str) -> bool:
    """Whether it can be a Hub id."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _policy_of(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("model", {})
    options = section.get("init_args", section) if isinstance(section, dict) else {}
    policy = options.get("policy") if isinstance(options, dict) else None
    return policy if isinstance(policy, dict) else {}


def config_of_run(run: Path) -> dict[str, Any]:
    """A run's config.yaml; empty where there is none, or it can't be read."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def started_in(run: Path) -> Path:
    """The folder that a run was started in, as its run.json says; the present one where it doesn't."""
    try:
        return Path(json.loads((run / "run.json").read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path()
