"""Which student block answers to which teacher block, from the plan alone."""

from __future__ import annotations

from tinyfusion.models.plan import PrunePlan


def block_pairs(plan: PrunePlan) -> list[tuple[int, int]]:
    """(student block, teacher block) pairs; indices count through the lists of blocks in order.

    With groups, the last kept student block of a group answers to the group's last teacher block. Without, student block
    k answers to teacher block kept[k + 1] - 1 and the last to the teacher's last: the student block and the teacher
    block that hand over to the same successor. Source: the published pairs for D19, D14, D7 follow the first rule.
    """
    pairs: list[tuple[int, int]] = []
    student_start = teacher_start = 0
    for name, depth in plan.depth.items():
        kept = sorted(plan.kept[name])
        groups = plan.groups.get(name) if plan.groups else None
        ends = (
            _group_ends(groups)
            if groups
            else [(k, kept[k + 1] - 1) for k in range(len(kept) - 1)] + [(len(kept) - 1, depth - 1)]
        )
        pairs += [(student_start + s, teacher_start + t) for s, t in ends]
        student_start += len(kept)
        teacher_start += depth
    return pairs


def _group_ends(groups: list[list[int]]) -> list[tuple[int, int]]:
    ends: list[tuple[int, int]] = []
    student = teacher = -1
    for keep, size in groups:
        student, teacher = student + keep, teacher + size
        ends.append((student, teacher))
    return ends
