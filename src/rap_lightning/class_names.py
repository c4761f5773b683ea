"""Class names on the command line: a misspelt one is answered with those that exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from rap_lightning.errors import ConfigError


def check_class_names(args: Sequence[str], bases: Mapping[str, type]) -> None:
    """Refuse a short class name that doesn't exist; jsonargparse would only say that it is no import path.

    Args:
        args: the command line.
        bases: what an option's class must be a subclass of: ``{"--model.loss": PreferenceLoss}``.

    Raises:
        ConfigError: names the nearest, and all that there are.
    """
    for option, value in _given(args):
        base = bases.get(option)
        if base is None or not value.isidentifier() or value in ("null", "None"):
            continue
        kinds = [base, *_below(base)]
        known = sorted(kind.__name__ for kind in kinds if not getattr(kind, "__abstractmethods__", None))
        if value not in known:
            near = get_close_matches(value, known, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{option} {value}: no such class.{hint} There are {', '.join(known)}; "
                "or give the import path of one of your own."
            )


def _given(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if equals:
            yield option, value
        elif place + 1 < len(args):
            yield arg, args[place + 1]


def _below(base: type) -> Iterator[type]:
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        if kind.__module__.startswith("rap_lightning."):
            yield kind
        yield from _below(kind)
