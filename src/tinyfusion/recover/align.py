"""Pairs of student and teacher blocks, and their common residual channels, computed from the plans.

Indices count through the lists of blocks in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tinyfusion.blocks.plan import PrunePlan, first_blocks, global_indices
from tinyfusion.blocks.stack import check_kept
from tinyfusion.config.loading import build, build_known
from tinyfusion.core.errors import UserError
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.facts import ModelFacts

Pairs = list[tuple[int, int]]
Groups = Mapping[str, list[list[int]]]


def block_pairs(plan: PrunePlan) -> Pairs:
    """(student block, teacher block) pairs for a student and the model it was pruned from.

    If the plan has groups (categorical gates), the last kept block of a group is paired with the group's last teacher
    block. Otherwise student block k is paired with teacher block kept[k + 1] - 1, so that both outputs go to the same
    next block, and the last student block with the last teacher block. Raises ValueError if kept blocks or groups do
    not fit the depth.
    Source: the published pairs for D19, D14, D7 follow the first rule.
    """
    return _pairs(plan.kept, plan.depth, plan.pairing_groups)


def _pairs(kept: Mapping[str, Sequence[int]], depth: Mapping[str, int], all_groups: Groups | None) -> Pairs:
    check_kept(kept, depth)
    pairs: Pairs = []
    student_first, teacher_first = first_blocks({name: len(kept[name]) for name in depth}), first_blocks(depth)
    for name, blocks in depth.items():
        own = sorted(kept[name])
        if groups := all_groups.get(name) if all_groups else None:
            stops = zip(*(accumulate(sizes) for sizes in zip(*groups, strict=True)), strict=True)
            ends = [(s - 1, t - 1) for s, t in stops]
            if ends[-1] != (len(own) - 1, blocks - 1):
                raise ValueError(f"groups {groups} do not keep {len(own)} of {blocks} {name}")
        else:
            ends = [*((k, following - 1) for k, following in enumerate(own[1:])), (len(own) - 1, blocks - 1)]
        pairs += [(student_first[name] + s, teacher_first[name] + t) for s, t in ends]
    return pairs


@dataclass(frozen=True)
class Ancestor:
    """One model of a lineage, as in `model.json`.

    kept, groups (None: unknown) and residual channels (None: all) come from the plan that pruned it from its own
    parent.
    """

    hash: str
    depth: dict[str, int]
    kept: dict[str, list[int]] | None = None
    groups: dict[str, list[list[int]]] | None = None
    residual: list[int] | None = None


def ancestors(facts: ModelFacts) -> list[Ancestor]:
    """The lineage of a model, oldest first. Raises UserError if it is damaged."""
    return [build_known(Ancestor, entry, f"lineage.{i}") for i, entry in enumerate(facts.lineage)]


def pairs_to_ancestors(facts: ModelFacts) -> dict[str, Pairs]:
    """{hash of an ancestor: (own block, ancestor's block) pairs}, the direct parent first.

    A block is paired with a block of the grandparent if its partner in the parent is paired too; last blocks
    always are. Raises ValueError on a damaged plan or lineage.
    """
    lineage = ancestors(facts)
    if facts.plan is None:
        return {}
    own = block_pairs(facts.plan)
    pairs = {lineage[-1].hash if lineage else facts.plan.teacher: own}
    for parent, child in reversed(list(pairwise(lineage))):
        if child.kept is None:
            break
        step = dict(_pairs(child.kept, parent.depth, child.groups))
        own = [(s, step[middle]) for s, middle in own if middle in step]
        pairs.setdefault(parent.hash, own)
    return pairs


def blocks_of_ancestor(facts: ModelFacts, ancestor: str) -> list[int] | None:
    """For every block of a pruned model, the block that it was in the ancestor of this hash; None if that is no ancestor."""
    own = facts.kept
    for parent in reversed(ancestors(facts)):
        if own is None:
            return None
        if parent.hash == ancestor:
            return global_indices(own, parent.depth)
        if parent.kept is None:
            return None
        own = {name: [parent.kept[name][block] for block in sorted(listed)] for name, listed in own.items()}
    return None


def pairs_between(student: ModelFacts, teacher: ModelFacts, teacher_hash: str) -> Pairs:
    """(student block, teacher block) pairs if the teacher is an ancestor of the student or shares one with it; else [].

    Blocks are paired through the youngest common ancestor, so a D7 pruned from XL can learn from a D14 pruned from XL.
    Published: teacher {XL, D14} x parent {XL, D14} (arXiv 2412.01199, table 7).
    """
    of_teacher = pairs_to_ancestors(teacher)
    for ancestor, own in pairs_to_ancestors(student).items():
        if ancestor == teacher_hash:
            return own
        if ancestor in of_teacher:
            paired = {block: t for t, block in of_teacher[ancestor]}
            return [(s, paired[block]) for s, block in own if block in paired]
    return []


def residual_channels(student: LoadedModel, teacher: LoadedModel) -> list[int] | None:
    """The teacher's residual channel for each of the student's, in order; None if both have the same channels.

    The teacher is an ancestor, or shares one. Raises UserError if the student has a channel that the teacher lacks,
    because their features cannot be compared.
    """
    own, of_teacher = _channels_in_ancestors(student.facts), _channels_in_ancestors(teacher.facts)
    if all(channels is None for channels in (*own.values(), *of_teacher.values())):
        return None
    teacher_hash = teacher.hash()
    if teacher_hash in own:
        return own[teacher_hash]
    common = next((ancestor for ancestor in own if ancestor in of_teacher), None)
    if common is None or own[common] == of_teacher[common]:
        return None
    narrow, wide = own[common], of_teacher[common]
    if wide is None:
        return narrow
    if narrow is None or not set(narrow) <= set(wide):
        raise UserError(
            "the student has residual channels that the teacher lacks, so their features cannot be compared: "
            "give their common ancestor as teacher, or use --method logits-kd"
        )
    return [wide.index(channel) for channel in narrow]


def _channels_in_ancestors(facts: ModelFacts) -> dict[str, list[int] | None]:
    """{hash of an ancestor: its channel for each of our own, None if they are the same}, the direct parent first."""
    widths = (facts.plan.kept_widths if facts.plan else None) or {}
    step: list[int] | None = build(list[int] | None, widths.get("residual"), "plan.kept_widths.residual")
    own: list[int] | None = None
    channels: dict[str, list[int] | None] = {}
    for ancestor in reversed(ancestors(facts)):
        if step is not None:
            kept = sorted(step)
            if own and max(own) >= len(kept):
                raise UserError(f"the student's lineage is damaged: it has channel {max(own)} of {len(kept)}")
            own = kept if own is None else [kept[channel] for channel in own]
        channels.setdefault(ancestor.hash, own)
        step = ancestor.residual
    return channels
