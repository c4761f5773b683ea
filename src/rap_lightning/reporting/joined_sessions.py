"""The earlier sessions of a run that went on from a checkpoint, as its run.json names them; where their files are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rap_lightning.reporting.curves import as_number


@dataclass(frozen=True)
class Session:
    """A session before the last one.

    Attributes:
        first, end: optimizer steps taken when it began, and at the checkpoint that the next went on from.
        seconds: wall time between the two; None where the checkpoint doesn't tell.
        folder: of its files; None where they aren't there any more, and then ``lost`` says why.
        record: its run.json.
    """

    first: int
    end: int
    seconds: float | None
    folder: Path | None
    lost: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def earlier_sessions(folder: Path, record: dict[str, Any]) -> list[Session]:
    """The sessions before the one whose files are in ``folder``, oldest first.

    A session's folder is looked for where it was, and beside ``folder``, if the runs were moved together. It is taken
    for the session's where its run.json was started at the moment that the checkpoint tells; another run may have
    taken its name.
    """
    continues = record.get("continues")
    told = continues.get("sessions") if isinstance(continues, dict) else None
    return [_session(one, folder) for one in told if isinstance(one, dict)] if isinstance(told, list) else []


def _session(told: dict[str, Any], folder: Path) -> Session:
    first, end = (int(as_number(told.get(key)) or 0) for key in ("from_step", "step"))
    seconds, was = as_number(told.get("seconds")), told.get("folder")
    if not isinstance(was, str):
        return Session(first, end, seconds, None, "the checkpoint doesn't tell where it ran")
    places = [Path(was), folder.resolve().parent / Path(was).name]
    for place in places:
        record = _record(place)
        if record and record.get("started") == told.get("started"):
            return Session(first, end, seconds, place, record=record)
    if any(_same(place, folder) for place in places):
        return Session(first, end, seconds, None, "the session after it wrote to the same folder")
    why = "holds another run now" if any(place.exists() for place in places) else "is gone"
    return Session(first, end, seconds, None, f"its folder {was} {why}")


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
