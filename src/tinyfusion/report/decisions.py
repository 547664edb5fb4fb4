"""Decisions over blocks: which stay, how sure that was, and which were decided at chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinyfusion.report.charts import Span, above_chance
from tinyfusion.report.run_data import RunData
from tinyfusion.report.tables import decision_groups

_COIN_TOSS = 0.1  # share of the way from chance to certainty below which a decision says nothing


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks that were decided together. blocks: (index, kept). label: "1 of 2", empty without groups.

    undecided: blocks whose probability is so near chance that another seed may well choose otherwise.
    """

    blocks: list[tuple[int, bool]]
    label: str
    confidence: float | None
    undecided: frozenset[int] = frozenset()

    @property
    def is_coin_toss(self) -> bool:
        """Whether nothing in the group was decided."""
        return len(self.undecided) == len(self.blocks)


def block_lists(run: RunData) -> dict[str, list[BlockGroup]]:
    """Every list of blocks in groups; one group without a label where the criterion knows none."""
    plan = run.plan
    if plan is None:
        return {}
    confidence, groups_of = final_confidence(run), decision_groups(run)
    lists: dict[str, list[BlockGroup]] = {}
    for name, depth in plan.depth.items():
        kept, sizes = set(plan.kept[name]), (plan.groups or {}).get(name)
        sure = list((confidence or {}).get(name, ()))
        spans, marginals = groups_of.get(name) or [], final_marginals(run).get(name)
        groups, start = [], 0
        for i, (keep, size) in enumerate(sizes or [[len(kept), depth]]):
            blocks = [(index, index in kept) for index in range(start, start + size)]
            level = sure[i] if i < len(sure) else None
            undecided = _undecided(blocks, spans[i], level, marginals) if level is not None and spans else frozenset()
            groups.append(BlockGroup(blocks, f"{keep} of {size}" if sizes else "", level, undecided))
            start += size
        lists[name] = groups
    return lists


def _undecided(
    blocks: Sequence[tuple[int, bool]], span: Span, level: float, marginals: Sequence[float] | None
) -> frozenset[int]:
    """Blocks of a group whose probability is at chance: by their own where each has one, else by the group's."""
    if span.fixed == span.keep or span.keep == span.size:
        return frozenset()  # protected, or nothing to choose
    if marginals is None:
        near = above_chance(level, span.choice_chance) < _COIN_TOSS
        return frozenset(index for index, _ in blocks) if near else frozenset()
    chance = span.block_chance
    away = {i: (value - chance) / (1 - chance) if kept else (chance - value) / chance
            for i, kept in blocks for value in (marginals[i],)}  # fmt: skip
    return frozenset(index for index, strength in away.items() if strength < _COIN_TOSS)


def final_marginals(run: RunData) -> Mapping[str, list[float]]:
    """The probability of every block to stay, per list, where a subset was learned; else empty."""
    plan = run.plan
    if not plan or not plan.groups or plan.distribution != "subset":
        return {}
    if run.decided and "probability" in str(plan.scores.get("meaning", "")):
        found = {name: plan.scores[name] for name in plan.groups if name in plan.scores}
        return {name: [value for group in rows for value in group] for name, rows in found.items()}
    lines = [line for line in run.metrics.get("prune", ()) if "marginals" in line]
    return lines[-1]["marginals"] if lines else {}


def final_confidence(run: RunData) -> Mapping[str, list[float]] | None:
    """How sure every group is: the plan's probability of the chosen candidate, else that of the last log line.

    Of a subset, where every block has a probability of its own, the mean of those that are kept.
    """
    plan = run.plan
    if not plan or not plan.groups:
        return None
    if marginals := final_marginals(run):
        groups = {name: sizes for name, sizes in plan.groups.items() if name in marginals}
        return {name: _means_of_kept(marginals[name], sizes, plan.kept[name]) for name, sizes in groups.items()}
    if run.decided and "probability" in str(plan.scores.get("meaning", "")):
        return {name: [max(group) for group in plan.scores[name]] for name in plan.groups if name in plan.scores}
    lines = [line for line in run.metrics.get("prune", ()) if "confidence" in line]
    return lines[-1]["confidence"] if lines else None


def _means_of_kept(values: Sequence[float], sizes: Sequence[Sequence[int]], kept: Sequence[int]) -> list[float]:
    """Mean over the kept blocks of every group [N, M]; values: one per block of the list."""
    means, start = [], 0
    for _, size in sizes:
        inside = [values[block] for block in kept if start <= block < start + size]
        means.append(sum(inside) / len(inside) if inside else 1.0)
        start += size
    return means
