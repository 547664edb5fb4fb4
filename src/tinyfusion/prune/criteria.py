"""Every criterion but the learned one: a function from a teacher to a plan.

Not here yet: block influence, Flux-Lite, sensitivity, BK-SDM, random search, width.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinyfusion.core.errors import UserError
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.plan import PrunePlan
from tinyfusion.models.stack import check_kept


def by_indices(teacher: LoadedModel, keep: Sequence[int], seed: int = 0) -> PrunePlan:
    """Keep exactly the named blocks; indices count through the lists of blocks in order.

    Raises UserError on indices out of range or named twice, or where a list would be left empty.
    """
    if not keep:
        raise UserError("criterion indices wants the blocks to keep: --keep 0,2,4")
    depths = teacher.stack.depths()
    total = sum(depths.values())
    outside = [i for i in keep if not 0 <= i < total]
    if outside:
        raise UserError(f"--keep {outside} out of range: the model has blocks 0 to {total - 1}")
    kept: dict[str, list[int]] = {}
    start = 0
    for name, depth in depths.items():
        kept[name] = sorted(i - start for i in keep if start <= i < start + depth)
        start += depth
    try:
        check_kept(kept, depths)
    except ValueError as error:
        raise UserError(f"--keep: {error}") from error
    return PrunePlan(kept=kept, depth=depths, criterion="indices", seed=seed, teacher=teacher.hash())
