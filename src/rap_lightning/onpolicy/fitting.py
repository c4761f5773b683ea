"""The training stage of a round: ``rap-lightning fit`` on a config that is written for it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.jsonl_ledger import write_whole

TAKEN = {"path": "the round's policy", "source": "the round's pairs", "goal": "the round's goal.yaml"}


def fit_config(
    user: dict[str, Any], policy: str, initial: str, pairs: Path, relabelling: dict[str, Any], run: Path,
    reference: Literal["policy", "initial"],
) -> dict[str, Any]:  # fmt: skip
    """The user's options with those that a round decides.

    Raises:
        ConfigError: the user's options decide something that the round does.
    """
    config = copy.deepcopy(user)
    model, data = _arguments(config, "model"), _arguments(config, "data")
    if not isinstance(model.setdefault("policy", {}), dict):
        raise ConfigError("fit.model.policy: expected options of the policy, {lora: {r: 16}} say")
    for section, options, names in (
        ("model.policy", model["policy"], ("path",)),
        ("data", data, ("source", *relabelling, "outside_scale", "format", "columns")),
    ):
        if taken := [name for name in names if name in options]:
            raise ConfigError(
                f"fit.{section}.{taken[0]} has no effect: every round sets it "
                f"({TAKEN.get(taken[0], 'from the options of rounds')})."
                " Remove it."
            )
    model["policy"]["path"] = policy
    if reference == "initial":
        if "reference" in model:
            raise ConfigError("fit.model.reference has no effect beside reference initial; remove one of the two.")
        model["reference"] = {"class_path": "Frozen", "init_args": {"path": initial}}
    data |= {"source": str(pairs.resolve()), **relabelling}
    trainer = config.setdefault("trainer", {})
    if "default_root_dir" in trainer:
        raise ConfigError("fit.trainer.default_root_dir has no effect: every round has a folder of its own. Remove it.")
    trainer["default_root_dir"] = str(run.resolve())
    if model["policy"].get("lora"):
        config.setdefault("export", {})["merge"] = True  # the next round's policy is a whole model
    return config


def _arguments(config: dict[str, Any], section: str) -> dict[str, Any]:
    """A section's options, where it names a class its arguments."""
    found = config.setdefault(section, {})
    if isinstance(found, str):
        found = config[section] = {"class_path": found}
    arguments = found.setdefault("init_args", {}) if "class_path" in found else found
    if not isinstance(arguments, dict):
        raise ConfigError(f"fit.{section}: expected options, found {arguments!r}")
    return arguments


def write_config(path: Path, config: dict[str, Any]) -> None:
    """The config, with the command that runs it."""
    head = f"# rap-lightning fit --config {path.name}\n# Written for this round.\n\n"
    write_whole(path, head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def check(path: Path) -> None:
    """Let fit read a config, without running it.

    Raises:
        ConfigError: it says what is wrong.
    """
    done = subprocess.run(_command(path, "--print_config"), capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"the options under fit are refused by rap-lightning fit:\n  {' '.join(said[-6:])}")


def run_fit(config: Path, run: Path) -> Path:
    """Train, or go on with a run that was stopped; the folder of the trained model.

    Raises:
        ConfigError: fit ended with an error; it has said why.
    """
    if (trained := _trained(run)) is not None:
        return trained
    last = max(run.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    go_on = ["--ckpt_path", str(last)] if last is not None else []
    if go_on:
        print(f"fit: going on from {last}")
    child = subprocess.Popen(_command(config, *go_on))
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child got it too, and writes a checkpoint
        child.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    found = _trained(run)
    if code or found is None:
        raise ConfigError(
            f"fit ended with {code} (its message stands above). What is finished is kept: mend it, and start "
            "the same rounds again."
        )
    return found


def _trained(run: Path) -> Path | None:
    """The newest exported model of a run; an adapter's merged into its base."""
    folders = [path for path in run.glob("version_*/hf*") if (path / "config.json").is_file()]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rap_lightning.cli.main", "fit", "--config", str(config), *more]
