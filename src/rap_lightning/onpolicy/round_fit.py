"""The training stage of a round: ``rap-lightning fit`` in a process of its own, on a config written for the round."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.jsonl_ledger import write_atomically
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.preferences.template_options import TemplateOptions

SET_BY_ROUND = {"path": "the round's policy", "source": "the round's pairs", "goal": "the round's goal.yaml"}


def fit_config(
    user: dict[str, Any], policy: str, initial: str, pairs: Path, relabelling: dict[str, Any], run: Path,
    reference: Literal["policy", "initial"],
) -> dict[str, Any]:  # fmt: skip
    """Return the user's options of fit together with those that a round sets, which the user must leave out."""
    config = copy.deepcopy(user)
    model, data = _arguments(config, "model"), _arguments(config, "data")
    own_policy = model.setdefault("policy", {})
    if not isinstance(own_policy, dict):
        raise ConfigError("fit.model.policy: expected options of the policy: {lora: {r: 16}}")
    _refuse("model.policy", own_policy, ("path",))
    _refuse("data", data, ("source", *relabelling, "outside_scale", "format", "columns"))
    own_policy["path"] = policy
    if reference == "initial":
        if "reference" in model:
            raise ConfigError("fit.model.reference has no effect beside reference initial; remove one of the two.")
        model["reference"] = {"class_path": "Frozen", "init_args": {"path": initial}}
    data |= {"source": str(pairs.resolve()), **relabelling}
    trainer = config.setdefault("trainer", {})
    if "default_root_dir" in trainer:
        raise ConfigError("fit.trainer.default_root_dir has no effect: every round has a folder of its own. Remove it.")
    trainer["default_root_dir"] = str(run.resolve())
    if own_policy.get("lora"):
        config.setdefault("export", {})["merge"] = True  # the next round's policy must be a whole model
    return config


def template_options(fit: dict[str, Any]) -> TemplateOptions:
    """Return which chat template the options of fit name, so that the first round generates with it too."""
    data = _arguments(copy.deepcopy(fit), "data")
    return TemplateOptions(data.get("chat_template"), data.get("chat_template_kwargs") or {})


def data_seed(fit: dict[str, Any]) -> int:
    """Return the seed of the data in the options of fit: it decides which half and which goals are drawn."""
    default: int = inspect.signature(ReadingOptions).parameters["seed"].default
    return int(_arguments(copy.deepcopy(fit), "data").get("seed", default))


def _refuse(section: str, options: dict[str, Any], names: tuple[str, ...]) -> None:
    if taken := [name for name in names if name in options]:
        origin = SET_BY_ROUND.get(taken[0], "from the options of rounds")
        raise ConfigError(f"fit.{section}.{taken[0]} has no effect: every round sets it ({origin}). Remove it.")


def _arguments(config: dict[str, Any], section: str) -> dict[str, Any]:
    """Return a section's options: its ``init_args`` if it names a class."""
    found = config.setdefault(section, {})
    if isinstance(found, str):
        found = config[section] = {"class_path": found}
    arguments = found.setdefault("init_args", {}) if "class_path" in found else found
    if not isinstance(arguments, dict):
        raise ConfigError(f"fit.{section}: expected options, found {arguments!r}")
    return arguments


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a config, headed by the command that runs it."""
    head = f"# rap-lightning fit --config {path.name}\n# Written for this round.\n\n"
    write_atomically(path, head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def check_config(path: Path) -> None:
    """Have fit parse a config without running it; a refusal has fit's message."""
    done = subprocess.run(_command(path, "--print_config"), capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"the options under fit are refused by rap-lightning fit:\n  {' '.join(said[-6:])}")


def run_fit(config: Path, run: Path) -> Path:
    """Train, or resume a stopped run; return the folder of the exported model."""
    if (trained := _exported(run)) is not None:
        return trained
    last = max(run.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    if last is not None:
        print(f"fit: resuming from {last}")
    child = subprocess.Popen(_command(config, *(["--ckpt_path", str(last)] if last is not None else [])))
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child received it too, and writes a checkpoint
        child.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    found = _exported(run)
    if code or found is None:
        raise ConfigError(
            f"fit ended with exit code {code}; its message is above. Finished stages are kept: fix the cause, and "
            "start the same rounds again."
        )
    return found


def _exported(run: Path) -> Path | None:
    """Return the newest exported model of a run; an adapter's is merged into its base."""
    folders = [path for path in run.glob("version_*/hf*") if (path / "config.json").is_file()]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rap_lightning.cli.main", "fit", "--config", str(config), *more]
