"""The goal record (goal.json) of an adapter that is written at its best goal's strength; others stay as they are."""

from __future__ import annotations

from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any] | None


def at_best(record: Record) -> tuple[Record, float]:
    """Return the record of the adapter at the best goal, and the factor on its weights."""
    if record is None or "adapter_at" not in record:
        return record, 1.0
    return {**record, "adapter_at": record["strength"]}, record["strength"] / record["adapter_at"]


def merged_record(record: Record) -> Record:
    """Return the record of the merged model: its strength is fixed, so a goal is what its prompt says, if anything."""
    return record["prompt"] if record is not None and "adapter_at" in record else record
