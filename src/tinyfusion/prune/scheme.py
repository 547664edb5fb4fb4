"""N:M schemes: which blocks may be kept together.

"2:4" keeps 2 of every 4 consecutive blocks; "2:4x3+3:4x4" lists the groups. Groups never cross from one list of blocks
into the next. L is the depth of a list.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinyfusion.core.errors import UserError

MAX_CANDIDATES = 1_000_000


@dataclass(frozen=True)
class Group:
    """Keep `keep` (N) of the `size` (M) consecutive blocks that begin at `start`."""

    keep: int
    size: int
    start: int

    @property
    def num_candidates(self) -> int:
        """binom(M, N)."""
        return math.comb(self.size, self.keep)

    def candidates(self) -> list[tuple[int, ...]]:
        """Kept positions within the group, in lexicographic order (2:4: 01, 02, 03, 12, 13, 23)."""
        return list(itertools.combinations(range(self.size), self.keep))


def consecutive_groups(pairs: Sequence[Sequence[int]]) -> list[Group]:
    """Groups that follow one another, from [(N kept, M size), ...]."""
    groups: list[Group] = []
    for keep, size in pairs:
        groups.append(Group(keep, size, groups[-1].start + groups[-1].size if groups else 0))
    return groups


_PART = re.compile(r"(\d+):(\d+)(?:x(\d+))?")


def parse_scheme(scheme: str, depths: Mapping[str, int]) -> dict[str, list[Group]]:
    """The groups of every list of blocks.

    A single N:M fills each list; an explicit sum must fill the only list exactly. Raises UserError on bad spelling, on
    N not in 1..M, and where the groups do not fill the depth (saying which scheme would).
    """
    pairs: list[tuple[int, int]] = []
    for part in scheme.replace(" ", "").split("+"):
        match = _PART.fullmatch(part)
        if not match:
            raise UserError(f"scheme {scheme!r} is not N:M, N:MxCOUNT or a sum of them, such as 1:2 or 2:4x3+3:4x4")
        keep, size = int(match[1]), int(match[2])
        if not 1 <= keep <= size:
            raise UserError(
                f"scheme {scheme!r}: {keep}:{size} must keep at least 1 and at most {size} of {size} blocks"
            )
        pairs += [(keep, size)] * int(match[3] or 1)
    uniform = len(pairs) == 1 and "x" not in scheme
    groups: dict[str, list[Group]] = {}
    for name, depth in depths.items():
        used = pairs * (depth // pairs[0][1]) if uniform else pairs
        if sum(size for _, size in used) != depth:
            raise UserError(_misfit(scheme, pairs, depth, uniform))
        groups[name] = consecutive_groups(used)
    biggest = max(group.num_candidates for listed in groups.values() for group in listed)
    if biggest > MAX_CANDIDATES:
        raise UserError(
            f"scheme {scheme!r} has a group with {biggest:,} candidates, too many to enumerate; use smaller groups"
        )
    return groups


def _misfit(scheme: str, pairs: list[tuple[int, int]], depth: int, uniform: bool) -> str:
    if not uniform:
        return f"scheme {scheme!r} covers {sum(size for _, size in pairs)} blocks; the model has {depth}"
    keep, size = pairs[0]
    sizes = [m for m in range(2, depth + 1) if depth % m == 0]
    shares = [(max(1, round(keep / size * m)), m) for m in sizes]
    fits = [f"{n}:{m}" for n, m in shares if math.comb(m, n) <= MAX_CANDIDATES][:3]
    whole, rest = divmod(depth, size)
    if whole and rest:
        fits.append(f"{keep}:{size}x{whole}+{max(1, round(rest * keep / size))}:{rest}")
    if not fits:
        fits.append(f"1:2x{depth // 2}+1:1" if depth > 1 else "1:1")
    return f"scheme {scheme} needs a depth divisible by {size}; the model has {depth} blocks (try {' or '.join(fits)})"
