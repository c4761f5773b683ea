"""Plain values of all ranks."""

from __future__ import annotations

from typing import Any

import torch


def gathered(value: Any) -> list[Any]:
    """What each rank gave, by rank; all ranks must call it. Of a single process, its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
