"""The input of a criterion (teacher, settings, calibration set, number of blocks to keep per list), and its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.blocks.plan import PrunePlan, first_blocks
from tinyfusion.blocks.scheme import BlockGroup, check_range
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.calibrate import BlockStatistics, Calibration, Tick, block_statistics
from tinyfusion.prune.mask_search import LossSums, Mask, mask_losses

OLD_BK_SDM_DEPTH = 28


@dataclass(frozen=True)
class CriterionContext:
    """The input of a criterion. A subclass may select other units than blocks, and define their losses and statistics.

    calibration: None if the criterion needs none. tick: called with the number of blocks evaluated so far, over all
    calibration batches. begun: sums of a mask search to continue from. keep: called with the sums, to save them.
    publish: called with all losses of a mask search, and those of the cheap criteria, which are computed only for this
    comparison.
    """

    teacher: LoadedModel
    settings: PruneSection
    seed: int = 0
    calibration: Calibration | None = None
    tick: Tick = lambda done: None
    begun: LossSums | None = None
    keep: Callable[[LossSums], None] = lambda sums: None
    publish: Callable[[dict[str, Any]], None] | None = None

    @property
    def images(self) -> Calibration:
        """The calibration set, of a criterion that needs one."""
        assert self.calibration is not None, f"{self.settings.criterion} needs a calibration set"
        return self.calibration

    @property
    def groups(self) -> dict[str, BlockGroup]:
        """{list of blocks: the group of all its blocks}; indices count through the lists."""
        return list_groups(self.teacher, self.settings)

    @property
    def depths(self) -> dict[str, int]:
        return self.teacher.stack.depths()

    @property
    def depth(self) -> int:
        return sum(self.depths.values())

    @property
    def teacher_hash(self) -> str:
        return self.teacher.hash()

    @property
    def loss(self) -> str:
        """Description of the loss of a mask, for the plan."""
        return "loss (mse + vb)"

    def allows(self, mask: Mask) -> bool:
        """Whether a student may consist of the blocks of `mask`, whatever their number per list."""
        return True

    def preferred(self, order: Sequence[int]) -> Sequence[int]:
        """`order`, with the blocks that every valid student needs moved to the front."""
        return order

    def statistics(self, clean: bool) -> BlockStatistics:
        return block_statistics(self.teacher, self.images, clean, self.tick)

    def losses(
        self,
        masks: Sequence[Mask],
        tick: Tick = lambda done: None,
        begun: LossSums | None = None,
        keep: Callable[[LossSums], None] = lambda sums: None,
        prove: bool = True,
    ) -> LossSums:
        """Sums of the losses of masks over the calibration set; arguments as in `mask_losses`."""
        return mask_losses(self.teacher, self.images, masks, tick, begun, keep, prove)


def plan_for(
    context: CriterionContext,
    kept: Mapping[str, Sequence[int]],
    meaning: str,
    scores: Mapping[str, Any] | None = None,
    evaluations: int = 0,
    more: Mapping[str, Any] | None = None,
) -> PrunePlan:
    """The plan that keeps the blocks `kept` (global indices per list), with scores and cost.

    scores, more: stored under "scores", with `meaning`. evaluations: number of block evaluations per calibration batch;
    the plan's cost is the equivalent number of images in forward passes of the whole model.
    """
    calibration = context.calibration
    used = {} if not evaluations or calibration is None else {"calibration": calibration.record()}
    images = evaluations / context.depth * calibration.images if calibration else 0.0
    return PrunePlan(
        kept={name: [i - context.groups[name].start for i in listed] for name, listed in kept.items()},
        depth=context.depths,
        criterion=context.settings.criterion,
        scores={"meaning": meaning, **(scores or {}), **(more or {}), **used},
        seed=context.seed,
        teacher=context.teacher_hash,
        cost={"images": round(images, 1)},
    )


def list_groups(teacher: LoadedModel, settings: PruneSection) -> dict[str, BlockGroup]:
    """Every list of blocks as one group, of which `settings.num_keep` blocks stay; indices count through the lists.

    `num_keep` None: half of each list, rounded up. BK-SDM's rule determines its own number.
    Raises UserError if a list has fewer blocks, if more blocks are protected, or if a protected block does not exist.
    """
    depths = teacher.stack.depths()
    check_range("--protect", sorted(set(settings.protect)), depths)
    groups: dict[str, BlockGroup] = {}
    for name, start in first_blocks(depths).items():
        depth = depths[name]
        own = sorted({i for i in settings.protect if start <= i < start + depth})
        if settings.criterion == "bk-sdm":
            keep = len(bk_sdm_positions(depth, settings.bk_sdm_list, [i - start for i in own]))
            if settings.num_keep not in (None, keep):
                raise UserError(
                    f"bk-sdm's rule keeps {keep} of the {depth} blocks in list {name}, not {settings.num_keep}: "
                    "leave out --num-keep, or take a criterion that keeps any number, such as uniform"
                )
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


def bk_sdm_positions(depth: int, listed: str = "corrected", protected: Sequence[int] = ()) -> list[int]:
    """BK-SDM's rule as TinyFusion applies it: first of each pair in the first half, last of each pair in the second.

    The halves are depth // 2 blocks and the rest; pairs are counted from the outer ends, and a block left over in the
    middle stays. A pair with protected blocks keeps those instead. listed: "old" is the published list of 28 before its
    correction, with block 14 in place of 15. Raises UserError at any other depth.
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
