"""The goal record (goal.json) of an adapter that is written at a goal's strength; others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any] | None


def at_best(record: Record) -> tuple[Record, float]:
    """Return the record of the adapter at the best goal, and the factor on its weights."""
    return (record, 1.0) if record is None else at(record, record.get("strength", 1.0))


def at(record: Mapping[str, Any], strength: float) -> tuple[dict[str, Any], float]:
    """Return the record of the adapter at a strength, and the factor on its weights."""
    if "adapter_at" not in record:
        return dict(record), 1.0
    return {**record, "adapter_at": strength}, strength / record["adapter_at"]


def merged_record(record: Record) -> Record:
    """Return the record of the merged model: its strength is fixed, so a goal is what its prompt says, if anything."""
    return record["prompt"] if record is not None and "adapter_at" in record else record
