"""The earlier sessions of a resumed run, as its run.json names them, and where their files are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rap_lightning.reporting.text import as_number


@dataclass(frozen=True)
class Session:
    """A session before the last one.

    Attributes:
        first: optimizer steps taken when it began.
        end: optimizer steps at the checkpoint from which the next session resumed.
        seconds: wall time between the two; None where the checkpoint doesn't say.
        folder: where its files are; None where they were not found, with the reason in ``lost``.
        record: its run.json.
    """

    first: int
    end: int
    seconds: float | None
    folder: Path | None
    lost: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def earlier_sessions(folder: Path, record: dict[str, Any]) -> list[Session]:
    """Return the sessions before the one whose files are in ``folder``, oldest first.

    A session's folder is searched at its recorded place and next to ``folder`` (the runs may have been moved
    together). Its run.json must have the start time that the checkpoint recorded, since another run may have taken the
    name.
    """
    continues = record.get("continues")
    sessions = continues.get("sessions") if isinstance(continues, dict) else None
    return [_session(one, folder) for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []


def _session(recorded: dict[str, Any], folder: Path) -> Session:
    first, end = (int(as_number(recorded.get(key)) or 0) for key in ("from_step", "step"))
    seconds, was = as_number(recorded.get("seconds")), recorded.get("folder")
    if not isinstance(was, str):
        return Session(first, end, seconds, None, "the checkpoint doesn't name its folder")
    places = [Path(was), folder.resolve().parent / Path(was).name]
    for place in places:
        record = _record(place)
        if record and record.get("started") == recorded.get("started"):
            return Session(first, end, seconds, place, record=record)
    if any(place.resolve() == folder.resolve() for place in places):
        return Session(first, end, seconds, None, "the next session wrote to the same folder")
    why = "now holds another run" if any(place.exists() for place in places) else "does not exist"
    return Session(first, end, seconds, None, f"its folder {was} {why}")


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
