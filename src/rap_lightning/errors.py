"""The errors a user can cause. The command line prints their text alone, without a traceback."""

import sys
from collections.abc import Sequence


def few(names: Sequence[object], most: int = 4) -> str:
    """The first of many, and how many more there are.

    >>> few(["a", "b"]), few("abcdef")
    ('a, b', 'a, b, c, d and 2 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def say(message: object) -> None:
    """Print an error as the command line does: its text alone, after what was printed before it."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)


class UserError(ValueError):
    """Something the user can mend. The text says what was expected, what was found, and what to do.

    ``saves`` says whether a run that it ends is worth a checkpoint (not where the weights themselves are broken), and
    ``on_all_ranks`` whether all processes raise it, so that they can save one together.
    """

    saves: bool = True
    on_all_ranks: bool = False


class ConfigError(UserError):
    """An option is wrong, or has no effect next to another one."""


class DataError(UserError):
    """The data can't be used as they are."""


class NotFinite(UserError):
    """A loss, a gradient or a weight is infinite or no number."""


class OutOfMemory(UserError):
    """The device, or the machine, has no memory left."""


class NotSaved(UserError):
    """A checkpoint could not be written."""
