"""Numbers and foreign text in the form in which people read them."""

from __future__ import annotations

import math
import re

LONGEST = 420
"""Characters of a prompt or a response that the page shows."""

# Control characters, overrides of the text direction (which would show text as it isn't), lone surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: object, longest: int = LONGEST) -> str:
    """Return text without control characters, cut to a length. The template escapes markup."""
    whole = str(text)
    shown = _CONTROL.sub("\ufffd", whole[:longest].replace("\r\n", "\n"))
    return shown if len(whole) <= longest else f"{shown.rstrip()} … ({len(whole):,} characters in all)"


def as_number(text: object) -> float | None:
    """Return a finite number, or None."""
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def number(value: float | None, percent: bool = False) -> str:
    """Return three significant digits, whole numbers with separators; a dash for None and nan."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.0f}%"
    if abs(value) >= 1000 or value == int(value):
        return f"{value or 0:,.0f}"  # `or 0` turns -0.0 into 0
    shown = f"{value:.3g}"
    return f"{value:.4f}" if "e" in shown and abs(value) > 1e-4 else shown


def counted(count: int, noun: str) -> str:
    """Return ``1 line``, ``2,000 lines``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(names: list[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def duration(seconds: float) -> str:
    """Return ``22 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Return bytes as GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
