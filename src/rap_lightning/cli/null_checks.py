"""Options that were set to null and can't be: jsonargparse lets null through for every type."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from rap_lightning.errors import ConfigError


def refuse_nulls(owner: type, options: Any, prefix: str) -> None:
    """Raise ConfigError for an option of a class that is null and can't be.

    Args:
        owner: the class that the options are for.
        options: what was parsed of them, as nested namespaces.
        prefix: the options' name so far: ``--data``.
    """
    found = sorted(_nulls(owner, options, prefix))
    if found:
        names = ", ".join(name for name, _ in found)
        defaults = "; ".join(
            f"{name}: {default!r}" for name, default in found if default is not inspect.Parameter.empty
        )
        raise ConfigError(
            f"{names} can't be null. Leave it out for its default" + (f" ({defaults})." if defaults else ".")
        )


def _nulls(owner: type, options: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    try:
        hints = typing.get_type_hints(owner if dataclasses.is_dataclass(owner) else owner.__init__)  # type: ignore[misc]
        parameters = inspect.signature(owner).parameters
    except (TypeError, ValueError, NameError):
        return  # a class of the user's own that can't be looked into
    values = options if isinstance(options, dict) else vars(options)
    for name, value in values.items():
        hint = hints.get(name)
        if hint is None or name not in parameters:
            continue
        default = parameters[name].default
        if value is None:
            if not _allows_none(hint) and default is not None:
                plain = default if isinstance(default, str | int | float | bool | list) else inspect.Parameter.empty
                yield f"{prefix}.{name}", plain
        elif hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
            inner = _class_of(hint, value)
            if inner is not None:
                yield from _nulls(inner, vars(value).get("init_args") or value, f"{prefix}.{name}")


def _allows_none(hint: Any) -> bool:
    if hint is Any or hint is None or hint is type(None):
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_allows_none(part) for part in typing.get_args(hint))
    return typing.get_origin(hint) is typing.Literal and None in typing.get_args(hint)


def _class_of(hint: Any, value: Any) -> type | None:
    """The class that a namespace holds the options of."""
    path = vars(value).get("class_path")
    if isinstance(path, str) and "." in path:
        try:
            module, _, name = path.rpartition(".")
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            return None
        return found if isinstance(found, type) else None
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)), None)
