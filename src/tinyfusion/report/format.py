"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def significant(value: float | None, digits: int = 3) -> str:
    """A number to that many significant digits, never in exponent form between 1e-3 and 1e6; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of paths that tell different ones apart: "runs/a/student" is "student", or "a/student"."""
    whole = [path.rstrip("/").split("/") for path in paths]
    for num in range(1, max(map(len, whole), default=0) + 1):
        names = ["/".join(folders[-num:]) for folders in whole]
        if len(set(names)) == len(set(map(tuple, whole))):
            return names
    return list(paths)


def count(value: float | None) -> str:
    """A count with a prefix: 912 k, 13.8 M, 119 G; below 10,000 in full."""
    if value is None:
        return "–"
    for size, prefix in _PREFIXES:
        if abs(value) >= (10_000 if prefix == "k" else size):
            scaled = value / size
            return f"{scaled:.0f} {prefix}" if abs(scaled) >= 99.95 else f"{scaled:.1f} {prefix}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """4.2 s, 3 min 12 s, 1 h 4 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float | None) -> str:
    """A share in per cent: 0.5 is 50 %; below 10 % with one decimal, far below with one digit; just below 1 "> 99 %"."""
    if share is None or 0.995 <= share < 1:
        return "–" if share is None else "> 99 %"
    if 0 < abs(share) < 0.0005:
        return f"{100 * share:.1g} %"
    return f"{100 * share:.1f} %" if 0 < abs(share) < 0.0995 else f"{100 * share:.0f} %"


def printable(text: str) -> str:
    """A text that UTF-8 can encode: bytes of names that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
