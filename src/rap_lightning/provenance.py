"""Where a run comes from: package versions, the state of git, and the command without secrets."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

CHIEF = ("rap-lightning", "torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "deepspeed")
"""Packages that a model card lists."""

MASK = "***"
"""What is shown in the place of a secret."""

_WORDS = (
    r"(?:(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!stop_)token$|secret|passw|pass_?phrase|api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key|credential"
    r"|authori[sz]ation|cookie|bearer)"
)
_SECRET = re.compile(_WORDS, re.IGNORECASE)
"""Names whose values are secret; ``token_budget``, ``max_new_tokens`` and ``api_key_env`` must not match."""
_ENVIRONMENT = re.compile(r"(?<![A-Za-z0-9])(env|file|path|dir|column)$", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?<![\w./-])(?:"
    r"(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|r8_)(?=[\w-]*\d|[\w-]{16})[\w-]{8,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"  # a JSON web token
)
"""Values that are keys under any name."""
_SCHEME = re.compile(r"\b(Bearer|Basic)\s+(?!\*)(?=\S*\d|\S{16})[\w.~+/=-]{8,}", re.IGNORECASE)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
_NAMED = re.compile(
    r"([\w.-]*?" + _WORDS.replace("$", r"(?![\w-])") + r"(?!_env)[\w-]*[\"']?\s*[:=]\s*)"
    r"(?:\"[^\"]*\"|'[^']*'|(?!\*\*\*)[^\s,;&}\]\"']+)",
    re.IGNORECASE,
)
"""``name: value`` and ``name=value`` inside a text."""


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
    """Return whether an option's value must not be shown; a dotted name counts where one of its parts does."""
    return any(
        part.lower() == "key" or (_SECRET.search(part) and not _ENVIRONMENT.search(part)) for part in option.split(".")
    )


def mask_text(text: str) -> str:
    """Return a text for people or a log with every secret replaced by ***.

    Secrets are the values of environment variables with a secret's name, values that follow such a name, credentials
    in URLs, and what looks like a key (hf_..., sk-..., Bearer ...).
    """
    return _NAMED.sub(rf"\1{MASK}", mask_keys(text))


def mask_keys(text: str) -> str:
    """Mask what is a secret under any name: a value of the environment, credentials in a URL, a key by its form."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    text = _IN_URL.sub(rf"\1{MASK}@", text)
    return _TOKEN.sub(MASK, _SCHEME.sub(rf"\1 {MASK}", text))


def _environment_secrets() -> list[str]:
    """Return secret values of the environment, longest first; not paths, nor what is short enough to be in a word."""
    found = {value for name, value in os.environ.items() if len(value) >= 8 and value[0] != "/" and names_secret(name)}
    return sorted(found, key=len, reverse=True)


def masked(value: Any, name: str = "") -> Any:
    """Return options with every secret in them replaced by ***, at any depth of dicts, namespaces and lists.

    A text is searched for keys by their form alone: a goal template may well say "token: 7".
    """
    if isinstance(value, dict):
        return {key: masked(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, Namespace):
        return type(value)(**masked(vars(value), name))
    if isinstance(value, list | tuple):
        return [masked(inner, name) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if name and names_secret(name):
        return MASK
    return mask_keys(value) if isinstance(value, str) else value


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested options by dotted name (``model.loss.beta``), as flags spell them: without ``init_args``."""
    if not isinstance(options, dict) or not options:
        return {prefix: options} if prefix else {}
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flatten(value, prefix if name == "init_args" else f"{prefix}.{name}".strip("."))
    return found


def command_line(args: Sequence[str]) -> str:
    """Return the command as it was given, for a shell, with secrets replaced by ***."""
    return shlex.join(masked_arguments(args))


def masked_arguments(args: Sequence[str]) -> list[str]:
    """Return the arguments of a command with secrets replaced by ***."""
    shown, hide = [], False
    for arg in args:
        name, equals, value = arg.partition("=")
        option = name.startswith("-")
        secret = option and names_secret(name)
        if hide:
            shown.append(MASK)
        elif secret and equals:
            shown.append(f"{name}={MASK}")
        else:
            shown.append(f"{name}={mask_text(value)}" if option and equals else mask_text(arg))
        hide = secret and not equals and not hide
    return shown
