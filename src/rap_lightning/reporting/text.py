"""Numbers and foreign text as people read them."""

from __future__ import annotations

import math
import re
from unicodedata import bidirectional

LONGEST = 420
"""Characters of a prompt or response that the page shows."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters, overrides of the direction of text (which would show it as it isn't), halves of characters."""


def clean(text: object, longest: int = LONGEST) -> str:
    """Foreign text that any browser and font takes: no control characters, no half characters, not without end.

    Escaping is the template's; directions are isolated there too.
    """
    whole = str(text)
    shown = _CONTROL.sub("\ufffd", whole[:longest].replace("\r\n", "\n"))
    return shown if len(whole) <= longest else f"{shown.rstrip()} … ({len(whole):,} characters in all)"


def isolated(name: str) -> str:
    """A name within a sentence: one that is written from right to left doesn't turn what stands around it."""
    turned = any(bidirectional(letter) in ("R", "AL") for letter in name)
    return f"\u2068{name}\u2069" if turned else name


def short(name: str, longest: int = 24) -> str:
    """A name for an axis: its middle goes where it is too long."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def number(value: float | None, percent: bool = False) -> str:
    """Three significant digits, whole numbers with separators; a dash for what isn't there."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.0f}%"
    if abs(value) >= 1000 or value == int(value):
        return f"{value or 0:,.0f}"
    shown = f"{value:.3g}"
    return f"{value:.4f}" if "e" in shown and abs(value) > 1e-4 else shown


def counted(count: int, what: str) -> str:
    """``1 line``, ``2,000 lines``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def listed(names: list[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def duration(seconds: float) -> str:
    """``22 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
