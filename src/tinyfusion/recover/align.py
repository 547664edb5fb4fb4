"""Which student block answers to which teacher block, from plans alone. Indices count through the lists in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tinyfusion.blocks.plan import PrunePlan, first_blocks
from tinyfusion.blocks.stack import check_kept
from tinyfusion.config.loading import build_known
from tinyfusion.models.checkpoint import ModelFacts

Pairs = list[tuple[int, int]]
Groups = Mapping[str, list[list[int]]]


def block_pairs(plan: PrunePlan) -> Pairs:
    """(student block, teacher block) pairs of a student and the model it was cut from.

    With groups (of a categorical), the last kept student block of a group answers to the group's last teacher block. Without, student block
    k answers to teacher block kept[k + 1] - 1 and the last to the teacher's last: the student block and the teacher
    block that hand over to the same successor. Raises ValueError on kept blocks or groups that do not fit the depth.
    Source: the published pairs for D19, D14, D7 follow the first rule.
    """
    return _pairs(plan.kept, plan.depth, plan.pairing_groups)


def _pairs(kept: Mapping[str, Sequence[int]], depth: Mapping[str, int], all_groups: Groups | None) -> Pairs:
    check_kept(kept, depth)
    pairs: Pairs = []
    student_first, teacher_first = first_blocks({name: len(kept[name]) for name in depth}), first_blocks(depth)
    for name, blocks in depth.items():
        own = sorted(kept[name])
        groups = all_groups.get(name) if all_groups else None
        if groups and [sum(sizes) for sizes in zip(*groups, strict=True)] != [len(own), blocks]:
            raise ValueError(f"groups {groups} do not keep {len(own)} of {blocks} {name}")
        ends = (
            _group_ends(groups)
            if groups
            else [(k, kept_next - 1) for k, kept_next in enumerate(own[1:])] + [(len(own) - 1, blocks - 1)]
        )
        pairs += [(student_first[name] + s, teacher_first[name] + t) for s, t in ends]
    return pairs


def _group_ends(groups: list[list[int]]) -> Pairs:
    ends: Pairs = []
    student = teacher = -1
    for keep, size in groups:
        student, teacher = student + keep, teacher + size
        ends.append((student, teacher))
    return ends


@dataclass(frozen=True)
class Ancestor:
    """One model of a lineage, as `model.json` has it.

    kept, groups and residual are of the plan that cut it: the blocks of its own parent that stayed, their groups (None
    where unknown) and the residual channels (None where all did).
    """

    hash: str
    depth: dict[str, int]
    kept: dict[str, list[int]] | None = None
    groups: dict[str, list[list[int]]] | None = None
    residual: list[int] | None = None


def ancestors(facts: ModelFacts) -> list[Ancestor]:
    """The lineage of a model, oldest first. Raises UserError where it is damaged."""
    return [build_known(Ancestor, entry, f"lineage.{i}") for i, entry in enumerate(facts.lineage)]


def pairs_to_ancestors(facts: ModelFacts) -> dict[str, Pairs]:
    """{hash of an ancestor: (own block, ancestor's block) pairs}, the direct parent first.

    Pairs to a grandparent are composed: those whose middle block is itself paired, so both ends close a group in both
    cuts. The last blocks always do. Raises ValueError on a damaged plan or lineage.
    """
    lineage = ancestors(facts)
    if facts.plan is None:
        return {}
    own = block_pairs(facts.plan)
    found = {lineage[-1].hash if lineage else facts.plan.teacher: own}
    for parent, child in reversed(list(pairwise(lineage))):
        if child.kept is None:
            break
        step = dict(_pairs(child.kept, parent.depth, child.groups))
        own = [(s, step[middle]) for s, middle in own if middle in step]
        found.setdefault(parent.hash, own)
    return found


def pairs_between(student: ModelFacts, teacher: ModelFacts, teacher_hash: str) -> Pairs:
    """Pairs of a student and any model it descends from, or that descends from one of its ancestors; [] where none does.

    Through the youngest common ancestor: the blocks that answer to the same block of it. So a D7 cut from XL can learn
    from a D14 cut from XL. Published: teacher {XL, D14} x parent {XL, D14} (arXiv 2412.01199, table 7).
    """
    of_teacher = pairs_to_ancestors(teacher)
    for ancestor, own in pairs_to_ancestors(student).items():
        if ancestor == teacher_hash:
            return own
        if ancestor in of_teacher:
            answering = {block: t for t, block in of_teacher[ancestor]}
            return [(s, answering[block]) for s, block in own if block in answering]
    return []
