"""Plain Python values from all ranks."""

from __future__ import annotations

from typing import Any

import torch


def gathered(value: Any) -> list[Any]:
    """Return the value of each rank, by rank; every rank must call it. A single process gets its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
