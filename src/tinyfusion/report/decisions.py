"""Decisions over blocks: the groups they are made in, chance levels, kept blocks and their confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.report.load import Run

_UNDECIDED = 0.1  # share of the range from chance to certainty below which a decision is called undecided


@dataclass(frozen=True)
class Span:
    """Consecutive blocks that are decided together: keep N of the M from `start` on, `fixed` of them protected."""

    start: int
    keep: int
    size: int
    fixed: int = 0

    @property
    def choice_chance(self) -> float:
        """One over the number of candidates: the confidence of a categorical at its start."""
        return 1 / comb(self.size - self.fixed, self.keep - self.fixed)

    @property
    def block_chance(self) -> float:
        """The marginal of an unprotected block of a subset at its start; 1 where all are protected."""
        free = self.size - self.fixed
        return (self.keep - self.fixed) / free if free else 1.0

    @property
    def name(self) -> str:
        """N:M."""
        return f"{self.keep}:{self.size}"


def spans(sizes: Sequence[Sequence[int]], protected: Sequence[int] = ()) -> list[Span]:
    """The groups of one list of blocks. sizes: [N, M] per group. protected: blocks of this list that always stay."""
    groups: list[Span] = []
    start = 0
    for keep, size in sizes:
        fixed = sum(start <= block < start + size for block in protected)
        groups.append(Span(start, keep, size, min(fixed, keep)))
        start += size
    return groups


def decision_groups(run: Run) -> dict[str, list[Span]]:
    """The groups of every list of blocks, with what the recipe protects; empty where the criterion has no groups."""
    if not run.plan or not run.plan.groups:
        return {}
    protected = [int(block) for block in (run.recipe.get("prune") or {}).get("protect") or ()]
    first = first_blocks(run.plan.depth)
    return {name: spans(sizes, [block - first[name] for block in protected]) for name, sizes in run.plan.groups.items()}


def above_chance(value: float, chance: float) -> float:
    """(value - chance) / (1 - chance), clamped to [0, 1]; 1 where chance is certainty."""
    return min(max((value - chance) / (1 - chance), 0.0), 1.0) if chance < 1 else 1.0


def signed_strength(value: float, chance: float) -> float:
    """A marginal probability as -1 (certainly removed) over 0 (chance) to 1 (certainly kept)."""
    return above_chance(value, chance) if value >= chance else max((value - chance) / chance, -1.0)


def decision_strengths(lines: Sequence[Mapping[str, Any]], groups: Sequence[Span], name: str) -> np.ndarray:
    """(blocks, log lines) in [-1, 1]: how far a decision is from chance.

    With marginals: `signed_strength` of every block. Else the confidence of a block's group above chance for kept blocks,
    and NaN for the others (arXiv 2412.01199, figure 6: opacity is (confidence - chance) / (1 - chance)).
    """
    span_of = [(g, span) for g, span in enumerate(groups) for _ in range(span.size)]
    values = np.full((len(span_of), len(lines)), np.nan)
    for column, line in enumerate(lines):
        if "marginals" in line:
            pairs = zip(line["marginals"][name], span_of, strict=True)
            values[:, column] = [signed_strength(value, span.block_chance) for value, (_, span) in pairs]
        else:
            for block in line["kept"][name]:
                group, span = span_of[block]
                values[block, column] = above_chance(line["confidence"][name][group], span.choice_chance)
    return values


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that were decided together. blocks: (index, kept). label: "1 of 2", empty without groups.

    undecided: blocks whose probability is so near chance that another seed may decide otherwise.
    """

    blocks: list[tuple[int, bool]]
    label: str = ""
    confidence: float | None = None
    undecided: frozenset[int] = frozenset()

    @property
    def is_undecided(self) -> bool:
        """Whether all of its blocks are."""
        return len(self.undecided) == len(self.blocks)


def block_lists(run: Run) -> dict[str, list[BlockGroup]]:
    """Every list of blocks in groups; one group without a label where the criterion has no groups."""
    if run.plan is None:
        return {}
    (confidence, marginals), groups = final_probabilities(run), decision_groups(run)
    lists: dict[str, list[BlockGroup]] = {}
    for name, depth in run.plan.depth.items():
        blocks = [(block, block in run.plan.kept[name]) for block in range(depth)]
        lists[name] = [] if name in groups else [BlockGroup(blocks)]
        for i, span in enumerate(groups.get(name, ())):
            own, known = blocks[span.start : span.start + span.size], confidence.get(name, ())
            level = known[i] if i < len(known) else None
            undecided = _undecided(own, span, level, marginals.get(name))
            lists[name].append(BlockGroup(own, f"{span.keep} of {span.size}", level, undecided))
    return lists


def _undecided(
    blocks: Sequence[tuple[int, bool]], span: Span, confidence: float | None, marginals: Sequence[float] | None
) -> frozenset[int]:
    """Blocks of a group at chance: by their own probability where each has one, else by that of the group."""
    if confidence is None or span.fixed == span.keep or span.keep == span.size:
        return frozenset()
    if marginals is None:
        strengths = [above_chance(confidence, span.choice_chance) for _ in blocks]
    else:
        signed = [signed_strength(marginals[block], span.block_chance) for block, _ in blocks]
        strengths = [value if kept else -value for value, (_, kept) in zip(signed, blocks, strict=True)]
    return frozenset(block for (block, _), value in zip(blocks, strengths, strict=True) if value < _UNDECIDED)


def final_probabilities(run: Run) -> tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]:
    """(confidence per group, marginal probability per block), per list; the latter for a learned subset alone.

    From the plan where it has them, else from the last log line. The confidence of a subset is the mean over kept blocks.
    """
    plan = run.plan
    if not plan or not plan.groups:
        return {}, {}
    is_probability = run.decided and "probability" in str(plan.scores.get("meaning", ""))
    rows = {name: plan.scores[name] for name in plan.groups if is_probability and name in plan.scores}
    last = (run.decision_lines or [{}])[-1]
    if plan.distribution != "subset":
        return {name: [max(row) for row in rows[name]] for name in rows} or last.get("confidence", {}), {}
    marginals = {name: [p for row in rows[name] for p in row] for name in rows} or last.get("marginals", {})
    means: dict[str, list[float]] = {}
    for name, values in marginals.items():
        groups = [set(range(s.start, s.start + s.size)) for s in spans(plan.groups[name])]
        kept = [[values[block] for block in plan.kept[name] if block in group] for group in groups]
        means[name] = [sum(inside) / len(inside) if inside else 1.0 for inside in kept]
    return means, marginals
