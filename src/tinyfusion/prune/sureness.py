"""How sure a learned decision is, in words: probabilities compared with chance, and a warning where it is little better."""

from __future__ import annotations

from tinyfusion.blocks.scheme import UNDECIDED, BlockGroup, above_chance, block_chance, choice_chance
from tinyfusion.prune.decision import Decision
from tinyfusion.prune.gates import SubsetGates


def sureness_lines(decision: Decision) -> list[str]:
    """A line of probabilities per list of blocks, and one warning that names what is undecided.

    A decision is undecided below a tenth of the way from chance to certainty: another seed may then decide otherwise.
    """
    of_blocks, levels, kept = isinstance(decision.gates, SubsetGates), decision.confidence(), decision.kept_units()
    what = "each kept block" if of_blocks else "each group's choice"
    lines, doubtful = [], []
    for name, groups in decision.groups.items():
        prefix = f"{name}: " if len(decision.groups) > 1 else ""
        inside = [[block for block in kept[name] if block in group.blocks] for group in groups]
        named = [
            (group, each) for group, own in zip(groups, inside, strict=True) for each in (own if of_blocks else [None])
        ]
        chances = [(block_chance if of_blocks else choice_chance)(group) for group, _ in named]
        open_ = sorted({round(chance, 2) for chance in chances if chance < 1})
        if not open_:
            continue  # nothing was to be decided
        shown = " ".join(f"{level:.2f}" for level in levels[name])
        lines.append(
            f"{prefix}probability of {what} {shown} (chance {' to '.join(f'{v:.2f}' for v in open_[:: len(open_) - 1 or 1])})"
        )
        for (group, block), level, chance in zip(named, levels[name], chances, strict=True):
            if chance < 1 and above_chance(level, chance) < UNDECIDED:
                doubtful.append(f"{prefix}{_named(group, block)} ({level:.2f})")
    if doubtful and not int(decision.gates.trial_images):  # else trials decided
        lines.append(
            f"warning: near chance, so another seed may decide otherwise: {', '.join(doubtful)}; these blocks matter equally, or the "
            "search was short: more steps, or a higher prune.gate_learning_rate, would tell"
        )
    return lines


def _named(group: BlockGroup, block: int | None) -> str:
    return f"blocks {group.blocks[0]} to {group.blocks[-1]}" if block is None else f"block {block}"
