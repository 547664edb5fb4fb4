"""N:M schemes: which blocks may be kept together.

"2:4" keeps 2 of every 4 consecutive blocks; "2:4x3+3:4x4" lists the groups; "50%" is one group, half of all blocks. Groups never
cross from one list of blocks into the next. L is the depth of a list. Protected blocks stay, and count as kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.core.errors import UserError

MAX_CANDIDATES = 1_000_000


@dataclass(frozen=True)
class BlockGroup:
    """`size` (M) consecutive blocks from `start`, of which `keep` (N) stay; the `protected` (P) are among those.

    Blocks are named by their index, within one list or through all of them: as `start` counts. runs: 0: any choice is a
    candidate; R: those whose removed blocks are R runs of consecutive blocks, as equal in length as possible (the first ones
    are longer by one where they must be). Runs may touch, so a single longer run is among the candidates.
    """

    start: int
    size: int
    keep: int
    protected: tuple[int, ...] = ()
    runs: int = 0

    @property
    def blocks(self) -> range:
        return range(self.start, self.start + self.size)

    @property
    def free(self) -> tuple[int, ...]:
        """Blocks that may stay or go, ascending."""
        return tuple(i for i in self.blocks if i not in self.protected)

    @property
    def keep_free(self) -> int:
        return self.keep - len(self.protected)

    @property
    def num_candidates(self) -> int:
        """binom(M - P, N - P); of R runs binom(N + R, R), fewer with protected blocks."""
        if not self.runs:
            return math.comb(len(self.free), self.keep_free)
        # placements of the runs so far, the last of them behind at most so many kept blocks
        ways = [1] * (self.keep + 1)
        for places in self._run_places():
            ways = list(itertools.accumulate(n * place.fits for n, place in zip(ways, places, strict=True)))
        return ways[-1]

    def candidates(self) -> list[tuple[int, ...]]:
        """Every choice of kept blocks, in lexicographic order (2:4 from 0: 01, 02, 03, 12, 13, 23; one run: 01, 03, 23)."""
        if not self.runs:
            return sorted(self.with_protected(free) for free in itertools.combinations(self.free, self.keep_free))
        chosen = []
        places = self._run_places()
        for before in itertools.combinations_with_replacement(range(self.keep + 1), len(places)):
            taken = [own[kept] for own, kept in zip(places, before, strict=True)]
            if all(place.fits for place in taken):
                removed = {block for place in taken for block in place.blocks}
                chosen.append(tuple(block for block in self.blocks if block not in removed))
        return sorted(chosen)

    def _run_places(self) -> list[list[_RunPlace]]:
        """Per run, in order, its place behind 0, 1, ... N kept blocks. Runs without a block are left out."""
        gone, begin = self.size - self.keep, self.start
        runs = min(self.runs, gone)
        places = []
        for run in range(runs):
            length = gone // runs + (run < gone % runs)
            spans = [range(begin + kept, begin + kept + length) for kept in range(self.keep + 1)]
            places.append([_RunPlace(span, not any(i in span for i in self.protected)) for span in spans])
            begin += length
        return places

    def with_protected(self, free: Iterable[int]) -> tuple[int, ...]:
        """The protected blocks and these free ones, ascending."""
        return tuple(sorted((*self.protected, *free)))

    def first_of(self, order: Iterable[int]) -> tuple[int, ...]:
        """The protected blocks, and of the free ones as many as stay, the first in `order`; ascending."""
        return self.with_protected([i for i in order if i in self.free][: self.keep_free])


@dataclass(frozen=True)
class _RunPlace:
    """Blocks of a removed run; fits: none of them is protected."""

    blocks: range
    fits: bool


def consecutive_groups(pairs: Iterable[Sequence[int]]) -> list[BlockGroup]:
    """Groups that follow one another, from [(N kept, M size), ...]."""
    groups: list[BlockGroup] = []
    for keep, size in pairs:
        groups.append(BlockGroup(groups[-1].blocks.stop if groups else 0, size, keep))
    return groups


_PART = re.compile(r"(\d+):(\d+)(?:x(\d+))?")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


def scheme_pairs(scheme: str) -> list[tuple[int, int]]:
    """(N kept, M size) of every group that a scheme spells out. Raises UserError on bad spelling and on N not in 1..M."""
    pairs: list[tuple[int, int]] = []
    for part in scheme.replace(" ", "").split("+"):
        match = _PART.fullmatch(part)
        if not match:
            raise UserError(
                f"scheme {scheme!r} is not N:M, N:MxCOUNT, a sum of them, or a share, such as 1:2, 2:4x3+3:4x4 or 50%"
            )
        keep, size = int(match[1]), int(match[2])
        if not 1 <= keep <= size:
            raise UserError(
                f"scheme {scheme!r}: {keep}:{size} must keep at least 1 and at most {size} of {size} blocks"
            )
        pairs += [(keep, size)] * int(match[3] or 1)
    return pairs


def schemes_by_list(scheme: str, lists: Collection[str]) -> list[str]:
    """The scheme of each list of blocks: one for all, or one per list, separated by semicolons. Raises UserError on other numbers."""
    schemes = scheme.split(";")
    if len(schemes) not in (1, len(lists)):
        raise UserError(
            f"scheme {scheme!r} is for {len(schemes)} lists of blocks, the model has {len(lists)}: {', '.join(lists)}"
        )
    return schemes * (len(lists) // len(schemes))


def spelled_out(scheme: str, depths: Mapping[str, int]) -> str:
    """The scheme with shares as N:M: "50%" of a list of 28 blocks is 14:28, one group. depths: blocks per list.

    N is rounded, and at least 1. Raises UserError on a share that is not above 0 and at most 100 %.
    """
    if "%" not in scheme:
        return scheme
    parts = []
    for own, depth in zip(schemes_by_list(scheme, depths), depths.values(), strict=True):
        share = _SHARE.fullmatch(own.strip())
        if share and not 0 < float(share[1]) <= 100:
            raise UserError(f"scheme {own!r} keeps a share of the blocks: wanted more than 0 and at most 100%")
        parts.append(f"{max(1, round(float(share[1]) * depth / 100))}:{depth}" if share else own)
    return ";".join(dict.fromkeys(parts) if len(set(parts)) == 1 else parts)


def parse_scheme(
    scheme: str,
    depths: Mapping[str, int],
    distribution: str = "categorical",
    protect: Sequence[int] = (),
    runs: int = 1,
) -> dict[str, list[BlockGroup]]:
    """The groups of every list of blocks.

    A single N:M fills each list, an explicit sum one list exactly, and a share such as 50% is of all blocks of a list, in one group;
    "10:19;1:2" has a scheme for each list, in order. protect:
    blocks that stay, counted through the lists in order. runs: removed runs of a group, with the distribution "runs". Raises
    UserError on bad spelling, on N not in 1..M, where the groups do not fill the depth (saying which scheme would), where a
    group cannot keep all its protected blocks, and where it would have no candidate, or too many to enumerate.
    """
    if runs != 1 and distribution != "runs":
        raise UserError(f"prune.runs is {runs}, and prune.distribution {distribution} has no runs: set it to runs")
    scheme = spelled_out(scheme, depths)
    groups: dict[str, list[BlockGroup]] = {}
    for own, (name, depth) in zip(schemes_by_list(scheme, depths), depths.items(), strict=True):
        pairs = scheme_pairs(own)
        uniform = len(pairs) == 1 and "x" not in own
        used = pairs * (depth // pairs[0][1]) if uniform else pairs
        if sum(size for _, size in used) != depth:
            several = f" in {name}; one scheme per list is as in 1:2;2:3" if len(depths) > 1 else ""
            raise UserError(_misfit(own, pairs, depth, uniform) + several)
        groups[name] = consecutive_groups(used)
    groups = _protected(scheme, groups, depths, protect)
    if distribution == "runs":
        first = first_blocks(depths)
        groups = {name: [_in_runs(scheme, group, runs, first[name]) for group in groups[name]] for name in groups}
    biggest = max(group.num_candidates for listed in groups.values() for group in listed)
    if distribution == "runs" and biggest > MAX_CANDIDATES:
        raise UserError(
            f"scheme {scheme!r} has a group with {biggest:,} choices of {runs} runs, too many to enumerate: set prune.runs "
            "lower, or use smaller groups, each of which has runs of its own"
        )
    if distribution == "categorical" and biggest > MAX_CANDIDATES:
        raise UserError(
            f"scheme {scheme!r} has a group with {biggest:,} candidates, too many to enumerate: set prune.distribution "
            "to subset, which learns one number per block, or use smaller groups"
        )
    return groups


def _in_runs(scheme: str, group: BlockGroup, runs: int, first: int) -> BlockGroup:
    """The group with its removed blocks in runs. Raises UserError where protected blocks leave no room for them.

    first: global index of the first block of its list, for the message.
    """
    group = dataclasses.replace(group, runs=runs)
    if group.num_candidates == 0:
        gone, shape = group.size - group.keep, "a run" if runs == 1 else f"{runs} runs"
        raise UserError(
            f"scheme {scheme!r} removes {gone} of {group.size} blocks in {shape}, and between the protected blocks "
            f"{', '.join(str(first + i) for i in group.protected)} there is no room: protect fewer, or set prune.runs higher"
        )
    return group


def _protected(
    scheme: str, groups: dict[str, list[BlockGroup]], depths: Mapping[str, int], protect: Sequence[int]
) -> dict[str, list[BlockGroup]]:
    """The same groups with the blocks `protect` fixed."""
    check_range("--protect", sorted(set(protect)), depths)
    fixed: dict[str, list[BlockGroup]] = {}
    for name, first in first_blocks(depths).items():
        fixed[name] = []
        for group in groups[name]:
            inside = sorted({i for i in protect if i - first in group.blocks})
            if len(inside) > group.keep:
                raise UserError(
                    f"scheme {scheme!r} keeps {group.keep} of blocks {first + group.start} to {first + group.blocks[-1]}, "
                    f"--protect wants {', '.join(map(str, inside))}: protect fewer of them, or use a scheme that keeps more there"
                )
            fixed[name].append(dataclasses.replace(group, protected=tuple(i - first for i in inside)))
    return fixed


def check_range(option: str, blocks: Sequence[int], depths: Mapping[str, int]) -> None:
    """Raise UserError where one of the `blocks` that `option` names, counted through the lists, does not exist."""
    total = sum(depths.values())
    outside = [i for i in blocks if not 0 <= i < total]
    if outside:
        raise UserError(f"{option} {outside} out of range: the model has blocks 0 to {total - 1}")


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


# ------------------------------------------------------------------------------------------------------------- probabilities

UNDECIDED = 0.1  # share of the range from chance to certainty below which a decision is called undecided


def choice_chance(group: BlockGroup) -> float:
    """One over the number of candidates: the confidence of a categorical at its start."""
    return 1 / max(group.num_candidates, 1)


def block_chance(group: BlockGroup) -> float:
    """The marginal of an unprotected block of a subset at its start; 1 where all are protected."""
    return group.keep_free / len(group.free) if group.free else 1.0


def above_chance(value: float, chance: float) -> float:
    """(value - chance) / (1 - chance), clamped to [0, 1]; 1 where chance is certainty."""
    return min(max((value - chance) / (1 - chance), 0.0), 1.0) if chance < 1 else 1.0


def signed_strength(value: float, chance: float) -> float:
    """A marginal probability as -1 (certainly removed) over 0 (chance) to 1 (certainly kept)."""
    return above_chance(value, chance) if value >= chance else max((value - chance) / chance, -1.0)
