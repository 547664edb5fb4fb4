"""Decisions over blocks: their groups, chance levels, kept blocks and their confidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.blocks.scheme import (
    UNDECIDED,
    BlockGroup,
    above_chance,
    block_chance,
    choice_chance,
    consecutive_groups,
    signed_strength,
)
from tinyfusion.report.load import Run


def decision_groups(run: Run) -> dict[str, list[BlockGroup]]:
    """The groups of every list of blocks, with what the recipe protects; empty where the criterion has no groups."""
    if not run.plan or not run.plan.groups:
        return {}
    protect = {int(block) for block in (run.recipe.get("prune") or {}).get("protect") or ()}
    first, runs = first_blocks(run.plan.depth), run.plan.runs or 0
    return {
        name: [
            dataclasses.replace(group, runs=runs)
            for group in with_protected(consecutive_groups(sizes), {block - first[name] for block in protect})
        ]
        for name, sizes in run.plan.groups.items()
    }


def with_protected(groups: Sequence[BlockGroup], protect: set[int]) -> list[BlockGroup]:
    """The groups of a list with these of its blocks protected, at most as many per group as stay."""
    inside = [tuple(sorted(protect.intersection(group.blocks)))[: group.keep] for group in groups]
    return [dataclasses.replace(group, protected=own) for group, own in zip(groups, inside, strict=True)]


def group_name(group: BlockGroup) -> str:
    """N:M."""
    return f"{group.keep}:{group.size}"


def decision_strengths(lines: Sequence[Mapping[str, Any]], groups: Sequence[BlockGroup], name: str) -> np.ndarray:
    """(blocks, log lines) in [-1, 1]: how far a decision is from chance.

    With marginals: `signed_strength` of every block. Else the confidence of a block's group above chance for kept blocks,
    and NaN for the others (arXiv 2412.01199, figure 6: opacity is (confidence - chance) / (1 - chance)).
    """
    group_of = [i for i, group in enumerate(groups) for _ in group.blocks]
    values = np.full((len(group_of), len(lines)), np.nan)
    for column, line in enumerate(lines):
        if "marginals" in line:
            pairs = zip(line["marginals"][name], group_of, strict=True)
            values[:, column] = [signed_strength(value, block_chance(groups[i])) for value, i in pairs]
        else:
            for block in line["kept"][name]:
                i = group_of[block]
                values[block, column] = above_chance(line["confidence"][name][i], choice_chance(groups[i]))
    return values


@dataclass(frozen=True)
class DecidedGroup:
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


def block_lists(run: Run) -> dict[str, list[DecidedGroup]]:
    """Every list of blocks in groups; one group without a label where the criterion has no groups."""
    if run.plan is None:
        return {}
    (confidence, marginals), groups = final_probabilities(run), decision_groups(run)
    lists: dict[str, list[DecidedGroup]] = {}
    for name, depth in run.plan.depth.items():
        blocks = [(block, block in run.plan.kept[name]) for block in range(depth)]
        lists[name] = [] if name in groups else [DecidedGroup(blocks)]
        for group, level in zip(groups.get(name, ()), [*confidence.get(name, ()), *[None] * depth], strict=False):
            own = [blocks[i] for i in group.blocks]
            undecided = _undecided(own, group, level, marginals.get(name))
            lists[name].append(DecidedGroup(own, f"{group.keep} of {group.size}", level, undecided))
    return lists


def _undecided(
    blocks: Sequence[tuple[int, bool]], group: BlockGroup, confidence: float | None, marginals: Sequence[float] | None
) -> frozenset[int]:
    """Blocks of a group at chance: by their own probability where each has one, else by that of the group."""
    if confidence is None or group.keep_free == 0 or group.keep == group.size:
        return frozenset()
    if marginals is None:
        strengths = [above_chance(confidence, choice_chance(group)) for _ in blocks]
    else:
        signed = [signed_strength(marginals[block], block_chance(group)) for block, _ in blocks]
        strengths = [value if kept else -value for value, (_, kept) in zip(signed, blocks, strict=True)]
    return frozenset(block for (block, _), value in zip(blocks, strengths, strict=True) if value < UNDECIDED)


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
        kept = [[values[i] for i in plan.kept[name] if i in g.blocks] for g in consecutive_groups(plan.groups[name])]
        means[name] = [sum(inside) / len(inside) if inside else 1.0 for inside in kept]
    return means, marginals
