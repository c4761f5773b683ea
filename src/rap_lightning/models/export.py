"""A trained policy as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, PolicyConfig


def full_state(policy: Policy) -> dict[str, Tensor]:
    """The policy's whole state on the CPU, gathered from all ranks where it is sharded. Every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(policy, options=options)
    return state


def export(
    policy: Policy, state: dict[str, Tensor], tokenizer: Any, output: Path, config: PolicyConfig, goal: Any = None
) -> None:
    """Write safetensors, tokenizer, chat template and ``goal.json`` to ``output``, all or nothing.

    An adapter is written as an adapter; :func:`merge` makes a whole model of it. ``goal`` is the record of the goal
    template that the policy was trained with, its best goal's text among it.

    Raises:
        ConfigError: ``output`` exists and is not empty.
    """
    with _all_or_nothing(output) as partial:
        own = {name.removeprefix("model."): value for name, value in state.items()}
        if policy.has_adapter and Path(config.path).is_dir():
            # an adapter names its base model; a relative path would only be found from this folder
            policy.model.peft_config["default"].base_model_name_or_path = str(Path(config.path).resolve())
        policy.model.save_pretrained(partial, state_dict=own, safe_serialization=True)
        tokenizer.save_pretrained(partial)
        _write_goal(partial, goal)


def merge(adapter: Path, output: Path, config: PolicyConfig, tokenizer: Any, goal: Any = None) -> None:
    """Write the base model with the adapter in folder ``adapter`` added to its weights in float32, all or nothing.

    Raises:
        ConfigError: ``output`` exists and is not empty.
    """
    from peft import PeftModel

    with _all_or_nothing(output) as partial:
        base = config.load_model(torch.float32)
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        merged.save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)
        _write_goal(partial, goal)


def _write_goal(folder: Path, goal: Any) -> None:
    if goal is not None:
        (folder / "goal.json").write_text(json.dumps(goal, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _all_or_nothing:
    """A folder beside ``output`` that takes its place when the block ends well, and goes when it doesn't."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
        refuse_non_empty(output)

    def __enter__(self) -> Path:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir()
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            if self.output.is_dir():
                self.output.rmdir()
            self.partial.rename(self.output)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def refuse_non_empty(output: Path) -> None:
    """Raise ConfigError where a file, or a folder with something in it, stands at ``output``."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty. Name another folder, or remove it.")
