"""Errors that a user can cause and resolve. The command line prints their text alone, without a traceback."""

import sys
from collections.abc import Sequence


def join_some(names: Sequence[object], most: int = 4) -> str:
    """The first of many names, and how many more there are.

    >>> join_some(["a", "b"]), join_some("abcdef")
    ('a, b', 'a, b, c, d and 2 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def first_line(error: object) -> str:
    """Return the first line of an error's message, "" where it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def print_error(message: object) -> None:
    """Print an error to standard error as the command line does, after everything printed before it."""
    from rap_lightning.provenance import mask_keys

    sys.stdout.flush()
    print(f"error: {mask_keys(str(message))}", file=sys.stderr)


class UserError(ValueError):
    """An error that the user can resolve. Its text says what happened, where, and what to do.

    Attributes:
        saves: whether a run that it ends is worth a checkpoint; not where the weights themselves are broken.
        on_all_ranks: whether every process raises it, so that the ranks can save a checkpoint together.
    """

    saves: bool = True
    on_all_ranks: bool = False


class ConfigError(UserError):
    """An option is wrong, or has no effect together with another one."""


class DataError(UserError):
    """The data cannot be used as they are."""


class NotFinite(UserError):
    """A loss, a gradient or a weight is infinite or NaN."""


class OutOfMemory(UserError):
    """The device or the host has no memory left."""


class NotSaved(UserError):
    """A checkpoint could not be written."""
