"""What a criterion reads, and the plan that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.config.recipe import PruneSection
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.calibrate import BlockStatistics, Calibration, Tick, block_statistics
from tinyfusion.prune.mask_search import LossSums, Mask, mask_losses
from tinyfusion.prune.rules import list_groups


@dataclass(frozen=True)
class CriterionContext:
    """What a criterion reads. A subclass may choose among other things than blocks, and measure them otherwise.

    calibration: None where the criterion needs none. tick: is told of evaluated blocks, over all calibration batches.
    begun, keep: sums of a mask search to go on from, and where to put them. publish: gets all losses of a mask search,
    with those of the cheap criteria, which are worked out for it alone.
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
        """The calibration set, which must be there."""
        assert self.calibration is not None, f"{self.settings.criterion} needs a calibration set"
        return self.calibration

    @property
    def groups(self) -> dict[str, BlockGroup]:
        """What every list keeps, blocks counted through the lists."""
        return list_groups(self.teacher, self.settings)

    @property
    def depths(self) -> dict[str, int]:
        """Blocks per list."""
        return self.teacher.stack.depths()

    @property
    def depth(self) -> int:
        """Blocks of all lists."""
        return sum(self.depths.values())

    @property
    def teacher_hash(self) -> str:
        """The hash of the model that the plan is for."""
        return self.teacher.hash()

    @property
    def loss(self) -> str:
        """The loss of a mask, in words."""
        return "loss (mse + vb)"

    def allows(self, mask: Mask) -> bool:
        """Whether only the blocks of `mask` may stay, apart from their numbers per list."""
        return True

    def preferred(self, order: Sequence[int]) -> Sequence[int]:
        """An order of blocks in which those that have to stay come first."""
        return order

    def statistics(self, clean: bool) -> BlockStatistics:
        """What every block does to its input, on the calibration set."""
        return block_statistics(self.teacher, self.images, clean, self.tick)

    def losses(
        self,
        masks: Sequence[Mask],
        tick: Tick = lambda done: None,
        begun: LossSums | None = None,
        keep: Callable[[LossSums], None] = lambda sums: None,
        prove: bool = True,
    ) -> LossSums:
        """The losses of masks on the calibration set, arguments as those of `mask_losses`."""
        return mask_losses(self.teacher, self.images, masks, tick, begun, keep, prove)


def plan_for(
    context: CriterionContext,
    kept: Mapping[str, Sequence[int]],
    meaning: str,
    scores: Mapping[str, Any] | None = None,
    evaluations: int = 0,
    more: Mapping[str, Any] | None = None,
) -> PrunePlan:
    """The decision as a plan. kept: global indices per list. scores, more: go under "scores", beside their meaning.

    evaluations: of one block on one calibration batch. The cost counts them as images that the whole model sees forward.
    """
    calibration = context.calibration
    looked = {} if not evaluations or calibration is None else {"calibration": calibration.record()}
    images = evaluations / context.depth * calibration.images if calibration else 0.0
    return PrunePlan(
        kept={name: [i - context.groups[name].start for i in listed] for name, listed in kept.items()},
        depth=context.depths,
        criterion=context.settings.criterion,
        scores={"meaning": meaning, **(scores or {}), **(more or {}), **looked},
        seed=context.seed,
        teacher=context.teacher_hash,
        cost={"images": round(images, 1)},
    )
