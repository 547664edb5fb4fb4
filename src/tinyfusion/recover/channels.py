"""Which residual channels of a teacher a narrower student has, from plans alone."""

from __future__ import annotations

from tinyfusion.config.loading import build
from tinyfusion.core.errors import UserError
from tinyfusion.models.checkpoint import LoadedModel, ModelFacts
from tinyfusion.recover.align import ancestors


def residual_channels(student: LoadedModel, teacher: LoadedModel) -> list[int] | None:
    """The teacher's channel for each of the student's, in order; None where they are the same.

    The teacher is an ancestor, or shares one. Raises UserError where the student has a channel that the teacher lacks:
    their features cannot be compared.
    """
    own, of_teacher = _in_ancestors(student.facts), _in_ancestors(teacher.facts)
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
    place = {channel: i for i, channel in enumerate(wide)}
    return [place[channel] for channel in narrow]


def _in_ancestors(facts: ModelFacts) -> dict[str, list[int] | None]:
    """{hash of an ancestor: its channel for each of our own, None where it is the same}, the direct parent first."""
    lineage = ancestors(facts)
    widths = (facts.plan.kept_widths if facts.plan else None) or {}
    step: list[int] | None = build(list[int] | None, widths.get("residual"), "plan.kept_widths.residual")
    own: list[int] | None = None
    found: dict[str, list[int] | None] = {}
    for ancestor in reversed(lineage):
        if step is not None:
            kept = sorted(step)
            if own and max(own) >= len(kept):
                raise UserError(f"the student's lineage is damaged: channel {max(own)} of {len(kept)} stayed")
            own = kept if own is None else [kept[channel] for channel in own]
        found.setdefault(ancestor.hash, own)
        step = ancestor.residual
    return found
