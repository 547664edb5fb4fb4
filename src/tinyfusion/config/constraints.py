"""Annotations of fields: limits of numbers, and texts that may be paths, checked by `config/loading.py`.

`Annotated[int, Ge(1), Le(2**16), "rank of the weight deltas"]`; the help text comes last. Upper limits are far above any use;
they prevent overflows.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

Number = int | float


@dataclass(frozen=True)
class Limit:
    """A bound of a number, in words and as a comparison of value and bound."""

    words: str
    holds: Callable[[Number, Number], bool]
    bound: Number

    def __str__(self) -> str:
        return f"{self.words} {self.bound:,}"


def _above(value: Number, bound: Number) -> bool:
    """By at least the smallest number that is not rounded to 0 where denormals are."""
    return value - bound >= sys.float_info.min


Ge = partial(Limit, "at least", operator.ge)
Gt = partial(Limit, "above", _above)
Le = partial(Limit, "at most", operator.le)
Lt = partial(Limit, "below", operator.lt)


@dataclass(frozen=True)
class Location:
    """Marks a text that may name a file or folder, alone or after one of the prefixes and a colon."""

    prefixes: tuple[str, ...] = ()

    def expanded(self, text: str, folder: Path | None = None) -> str:
        """`text` with `~` as the home folder, and a relative path from `folder` where it exists there.

        Without a prefix, a word without a slash or suffix is a name, not a path.
        """
        prefix, colon, path = text.partition(":")
        if not colon or prefix not in self.prefixes:
            prefix, colon, path = "", "", text
        path = os.path.expanduser(path)
        with suppress(OSError, ValueError):  # too long for a path, or a NUL
            if folder and (colon or "/" in path or Path(path).suffix) and (folder / path).exists():
                path = str(folder / path)
        return f"{prefix}{colon}{path}"


Count = Annotated[int, Ge(1), Le(10**9)]  # steps, images, tokens
CountOrZero = Annotated[int, Ge(0), Le(10**9)]  # where 0 turns something off
SmallCount = Annotated[int, Ge(1), Le(10**6)]  # rounds, repeats, blocks
BatchSize = Annotated[int, Ge(1), Le(2**20)]
Side = Annotated[int, Ge(1), Le(2**16)]  # of pictures, in pixels
Index = Annotated[int, Ge(0), Le(2**24)]  # of a block or class
Seed = Annotated[int, Ge(0), Le(2**64 - 1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
ShareBelowHalf = Annotated[float, Ge(0), Lt(0.5)]
Logit = Annotated[float, Ge(-1000), Le(1000)]
Offset = Annotated[float, Ge(-(10**9)), Le(10**9)]  # a number of either sign
