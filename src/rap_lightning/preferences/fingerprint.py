"""What a cache key must know of classes and functions that users write: their arguments, and their code."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any


def code_of(thing: Any) -> str:
    """Import path of a class or function, and a digest of the file that defines it and of those of its bases."""
    if not isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__} {_file_digest(thing)}"
    digests = [_file_digest(base) for base in thing.__mro__ if base is not object]
    return f"{thing.__module__}.{thing.__qualname__} {' '.join(dict.fromkeys(digests))}"


def describe(thing: Any) -> str:
    """Code and arguments of an object."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(thing).items()))
    return f"{code_of(type(thing))} ({arguments})"


def _file_digest(thing: Any) -> str:
    try:
        path = inspect.getsourcefile(thing)
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if path else ""
    except (OSError, TypeError):  # made in a console, or built in
        return ""
