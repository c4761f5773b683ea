"""The keys in which the configs of runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rap_lightning.provenance import masked
from rap_lightning.reporting.text import clean

ABSENT = "not set"


def differences(configs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return (key, value in each config) for the keys that differ; keys as flags spell them, without init_args."""
    flat = [dict(_flat(config)) for config in configs]
    keys = sorted({key for one in flat for key in one})
    rows = []
    for key in keys:
        values = [one.get(key, ABSENT) for one in flat]
        if len(set(values)) > 1:
            rows.append((key, [clean(masked(value, key), 160) for value in values]))
    return rows


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if key in ("init_args", "dict_kwargs") and prefix and not inner:
                continue  # without options, only the class's name is shown
            dropped = key in ("init_args", "dict_kwargs", "class_path") and prefix
            yield from _flat(inner, prefix if dropped else f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and (kinds := _kinds(value)):
        for kind, inner in zip(kinds, value, strict=True):
            options = inner.get("init_args")
            yield from _flat(options, f"{prefix}[{kind}]") if options else [(f"{prefix}[{kind}]", "with defaults")]
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _kinds(values: list[Any]) -> list[str]:
    """Return short names of the classes in a list; empty if it holds anything else, or a class twice."""
    names = [str(v["class_path"]).rpartition(".")[2] for v in values if isinstance(v, dict) and "class_path" in v]
    return names if len(names) == len(values) == len(set(names)) else []
