"""Where a run comes from: package versions, the state of git, and the command without secrets."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

CHIEF = ("rap-lightning", "torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "deepspeed")
"""Packages that a model card lists."""

_SECRET = re.compile(r"(token$|secret|passw|api_?key|credential)", re.IGNORECASE)
"""Option names whose values are secret; ``token_budget`` and ``max_new_tokens`` must not match."""


@cache  # each checkpoint asks, and reading all metadata takes up to 0.2 s
def packages() -> dict[str, str]:
    """Return name and version of every installed package."""
    read = [distribution.metadata for distribution in metadata.distributions()]  # parsed anew at each access
    found = {str(each["Name"]): str(each["Version"]) for each in read if each["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def versions() -> dict[str, str]:
    """Return Python's version and those of the packages in CHIEF."""
    installed = packages()
    return {"python": platform.python_version(), **{n: installed[n] for n in CHIEF if n in installed}}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of ``folder`` and the files that differ from it; None outside of a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    lines = changed.splitlines() if changed is not None else []
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if changed is None else bool(lines),
        "changed_files": [line[3:] for line in lines][:50],
    }


def _git(folder: Path, *args: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, no commit yet, or a very slow file system
    return done.stdout.rstrip("\n")


def names_secret(option: str) -> bool:
    """Return whether an option's value must not be shown."""
    return _SECRET.search(option) is not None


def command_line(args: Sequence[str]) -> str:
    """Return the command as it was given, for a shell, with the values of secret options replaced by ***."""
    shown, hide = [], False
    for arg in args:
        name, equals, _ = arg.partition("=")
        secret = name.startswith("-") and names_secret(name)
        shown.append("***" if hide else f"{name}=***" if secret and equals else arg)
        hide = secret and not equals and not hide
    return shlex.join(shown)
