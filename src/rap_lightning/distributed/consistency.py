"""What must be the same on every rank of a run, as names and short values."""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("rap-lightning", "torch", "transformers", "peft", "lightning")
OF_A_NODE = (
    "config",
    "trainer.default_root_dir",
    "model.policy.path",
    "data.source",
    "model.reference.folder",
)
"""Options that may differ from node to node: where things lie. What lies there is compared itself.

By their names without ``init_args``, which come in where a class is named.
"""


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed."""
    return {f"version of {name}": metadata.version(name) for name in PACKAGES}


def model_facts(path: str) -> dict[str, str]:
    """What can be known of a model's folder without reading its weights; nothing of a Hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return {}
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    config = (folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b""
    return {
        "model config": hashlib.sha256(config).hexdigest()[:12],
        "model files": hashlib.sha256(str(sizes).encode()).hexdigest()[:12],
    }


def flat(options: Any, prefix: str = "") -> dict[str, str]:
    """Nested options as dotted names, without those that may differ from node to node."""
    if prefix.replace(".init_args", "") in OF_A_NODE:
        return {}
    if not isinstance(options, dict):
        return {prefix: re.sub(r" at 0x[0-9a-f]+", "", str(options))}  # where a process happens to hold a default
    found: dict[str, str] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}.{name}".strip("."))
    return found


def difference(mine: dict[str, str], first: dict[str, str]) -> str:
    """In words; empty where there is none."""
    names = [name for name in sorted({*first, *mine}) if first.get(name) != mine.get(name)]
    shown = "; ".join(f"{name}: {mine.get(name)} there, {first.get(name)} on rank 0" for name in names[:4])
    return shown + (f"; and {len(names) - 4} more" if len(names) > 4 else "")
