"""How many blocks every list keeps, which of them are protected, and the lists that follow from a rule alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.blocks.scheme import BlockGroup, check_range
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel

OLD_BK_SDM_DEPTH = 28


def list_groups(teacher: LoadedModel, settings: PruneSection) -> dict[str, BlockGroup]:
    """Every list of blocks as one group, blocks counted through the lists.

    `num_keep` of each list stay; None: half, rounded up. BK-SDM's number follows from its rule.

    Raises UserError where a list has not that many, or more are protected, or a protected block does not exist.
    """
    depths = teacher.stack.depths()
    check_range("--protect", sorted(set(settings.protect)), depths)
    groups: dict[str, BlockGroup] = {}
    for name, start in first_blocks(depths).items():
        depth = depths[name]
        own = sorted({i for i in settings.protect if start <= i < start + depth})
        if settings.criterion == "bk-sdm":
            keep = len(bk_sdm_positions(depth, settings.bk_sdm_list, [i - start for i in own]))
            _check_rule(name, keep, depth, settings.num_keep)
        elif settings.criterion == "width":
            keep = depth
        else:
            keep = (depth + 1) // 2 if settings.num_keep is None else settings.num_keep
        if not 1 <= keep <= depth:
            raise UserError(f"--num-keep {keep}: list {name} has {depth} blocks, so 1 to {depth} of them can stay")
        if len(own) > keep:
            raise UserError(
                f"--protect names {len(own)} blocks of list {name}, of which only {keep} stay: "
                f"protect fewer, or give --num-keep {len(own)}"
            )
        groups[name] = BlockGroup(start, depth, keep, tuple(own))
    return groups


def _check_rule(name: str, keep: int, depth: int, wanted: int | None) -> None:
    if wanted not in (None, keep):
        raise UserError(
            f"bk-sdm's rule keeps {keep} of the {depth} blocks in list {name}, not {wanted}: "
            "leave out --num-keep, or take a criterion that keeps any number, such as uniform"
        )


def bk_sdm_positions(depth: int, listed: str = "corrected", protected: Sequence[int] = ()) -> list[int]:
    """BK-SDM's rule as TinyFusion applies it: first of each pair in the first half, last of each pair in the second.

    The halves are depth // 2 blocks and the rest; pairs are counted from the outer ends, and a block left over in the
    middle stays. A pair with protected blocks keeps those instead. listed: "old" is the published list of 28 before its
    correction, with block 14 in place of 15. Raises UserError where there is no such list.
    """
    half = depth // 2
    choices = [((i, i + 1), i) for i in range(0, half - 1, 2)] + [((i - 1, i), i) for i in range(depth - 1, half, -2)]
    if listed == "old":
        if depth != OLD_BK_SDM_DEPTH:
            raise UserError(
                f"prune.bk_sdm_list=old is a list for {OLD_BK_SDM_DEPTH} blocks, and here are {depth}: "
                "use corrected, which is a rule for any depth"
            )
        choices = [(pair, 14 if pair == (14, 15) else chosen) for pair, chosen in choices]
    kept = set(range(depth)) - {i for pair, _ in choices for i in pair}
    for pair, chosen in choices:
        kept |= (set(pair) & set(protected)) or {chosen}
    return sorted(kept)


def evenly_spaced(size: int, num: int) -> list[int]:
    """`num` of `size` positions: round(i (size - 1) / (num - 1)), halves up, so first and last are among them.

    One alone is the middle one, the earlier of two.
    """
    if num < 2:
        return [(size - 1) // 2][:num]
    return [(2 * i * (size - 1) + num - 1) // (2 * (num - 1)) for i in range(num)]


def _random(group: BlockGroup, _settings: PruneSection, seed: int) -> list[int]:
    """A random choice of the free blocks, addressed by (seed, list)."""
    order = Randomness(seed).permutation(f"random/{group.start}", 0, len(group.free))
    return [group.free[int(i)] for i in order[: group.keep_free]]


def _bk_sdm(group: BlockGroup, settings: PruneSection, _seed: int) -> list[int]:
    """The free blocks of BK-SDM's rule (arXiv 2305.15798); see `bk_sdm_positions`."""
    protected = [i - group.start for i in group.protected]
    positions = bk_sdm_positions(group.size, settings.bk_sdm_list, protected)
    return [group.start + i for i in positions if i not in protected]


# criterion -> which of the free blocks of a list stay, by (list, settings, seed)
RULES: dict[str, Callable[[BlockGroup, PruneSection, int], Sequence[int]]] = {
    "bk-sdm": _bk_sdm,
    "first": lambda group, _settings, _seed: group.free[: group.keep_free],
    "last": lambda group, _settings, _seed: group.free[len(group.free) - group.keep_free :],
    # first and last among them; protected ones are set aside, and the others spaced evenly
    "uniform": lambda group, _settings, _seed: [group.free[i] for i in evenly_spaced(len(group.free), group.keep_free)],
    "random": _random,
}
