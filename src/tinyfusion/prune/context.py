"""What a criterion is asked, and the plan that it answers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.config.recipe import PruneSection
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.calibrate import Calibration, Tick
from tinyfusion.prune.mask_search import LossSums
from tinyfusion.prune.rules import list_groups


@dataclass(frozen=True)
class CriterionContext:
    """What a criterion is asked.

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
    teacher, calibration = context.teacher, context.calibration
    looked = {} if not evaluations or calibration is None else {"calibration": calibration.record()}
    images = evaluations / len(teacher.stack) * calibration.images if calibration else 0.0
    return PrunePlan(
        kept={name: [i - context.groups[name].start for i in listed] for name, listed in kept.items()},
        depth=teacher.stack.depths(),
        criterion=context.settings.criterion,
        scores={"meaning": meaning, **(scores or {}), **(more or {}), **looked},
        seed=context.seed,
        teacher=teacher.hash(),
        cost={"images": round(images, 1)},
    )
