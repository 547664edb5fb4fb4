"""Training-free criteria: functions from a context to a plan, one row of `CRITERIA` each.

docs/criteria.md explains them. Every list of blocks keeps its own number of blocks; indices are global, they count
through the lists. Of equal scores the earlier block stays.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import PrunePlan, first_blocks, global_indices
from tinyfusion.blocks.scheme import BlockGroup, check_range
from tinyfusion.blocks.stack import check_kept
from tinyfusion.config.recipe import Criterion as Name
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.context import CriterionContext, bk_sdm_positions, plan_for
from tinyfusion.prune.mask_search import Mask, bits, loss_summary, random_masks, shared_evaluations, short, tick_from
from tinyfusion.prune.width import by_width, width_evaluations

MAX_LISTED_MASKS = 2000  # a plan of more masks has a summary of their losses
_MARKED: tuple[Name, ...] = ("bi", "flux-lite", "sensitivity", "bk-sdm", "first", "last", "uniform")


@dataclass(frozen=True)
class Criterion:
    """A criterion. plan: its function. evaluations: block evaluations per calibration batch; None: no calibration."""

    says: str
    plan: Callable[[CriterionContext], PrunePlan]
    evaluations: Callable[[CriterionContext], int] | None = None


def decide(context: CriterionContext) -> PrunePlan:
    """The plan of the context's criterion, with the seconds it took. Raises UserError if the settings do not fit."""
    began = time.perf_counter()
    plan = CRITERIA[context.settings.criterion].plan(context)
    return dataclasses.replace(plan, cost={"seconds": time.perf_counter() - began, **plan.cost})


# ------------------------------------------------------------------------------------------------------ scores of blocks


def by_block_influence(context: CriterionContext) -> PrunePlan:
    """ShortGPT's block influence (arXiv 2403.03853): 1 - mean cosine of output and input; the lowest go.

    Inputs are noised, over all timesteps. bi_inputs = clean is TinyFusion's released statistic: clean inputs at low
    timesteps, and the model's last block never goes. Cost: one pass.
    """
    clean = context.settings.bi_inputs == "clean"
    statistics = context.statistics(clean)
    scores = [1.0 - cosine for cosine in statistics.cosine]
    ranks = [*scores[:-1], math.inf] if clean else scores
    inputs = "clean inputs, first quarter of the timesteps, last block never removed" if clean else "noised inputs"
    return _ranked(context, ranks, scores, f"block influence, 1 - mean cosine of output and input: {inputs}")


def by_change(context: CriterionContext) -> PrunePlan:
    """Flux-Lite's criterion: mean of (output - input) squared; the lowest go. Cost: one pass.

    Source: model card of Freepik's flux.1-lite-8B. No details are published, so the calibration set is ours.
    """
    change = context.statistics(clean=False).change
    return _ranked(context, change, change, "mean squared difference of output and input")


def by_sensitivity(context: CriterionContext) -> PrunePlan:
    """Loss added by removing a block (Han et al., arXiv 1506.02626), under common timesteps and noise; the lowest go.

    One-shot: from the whole model. Greedy: the least harmful block goes, and the others are tried again.
    Cost: half a pass per block, greedy in each round.
    """
    return _greedy(context) if context.settings.sensitivity_order == "greedy" else _one_shot(context)


def _one_shot(context: CriterionContext) -> PrunePlan:
    whole, tried = _all_but_one(context)
    sums = context.losses(tried, context.tick)
    losses = dict(zip(tried, (sums.loss / sums.images).tolist(), strict=True))
    added = [losses.get(_without(whole, block), math.inf) - losses[whole] for block in whole]
    more = {"loss_of_whole_model": _finite(losses[whole])}
    meaning = f"{context.loss} added by removing the block alone; null where it is not finite"
    return _ranked(context, added, added, meaning, shared_evaluations(tried), more)


def _all_but_one(context: CriterionContext) -> tuple[Mask, list[Mask]]:
    """(whole model's mask, sorted list of it and all masks without one block); a list's only block always stays."""
    whole = tuple(range(context.depth))
    alone = {group.start for group in context.groups.values() if group.size == 1}
    return whole, sorted([whole, *(_without(whole, block) for block in whole if block not in alone)])


def _greedy(context: CriterionContext) -> PrunePlan:
    groups, kept = context.groups.values(), tuple(range(context.depth))
    added: list[float] = [math.inf] * len(kept)
    removed: list[int] = []
    loss, work = math.nan, 0
    while free := [
        i
        for group in groups
        if len({*kept} & {*group.blocks}) > group.keep
        for i in group.free
        if i in kept and context.allows(_without(kept, i))
    ]:
        tried = sorted([_without(kept, block) for block in free] + ([] if removed else [kept]))
        tick = partial(tick_from, context.tick, work * len(context.images.batches))
        sums = context.losses(tried, tick, prove=not removed)
        work += shared_evaluations(tried)
        losses = dict(zip(tried, (sums.loss / sums.images).tolist(), strict=True))
        loss = losses.pop(kept, loss)
        for mask, after in losses.items():
            added[_missing(mask, kept)] = after - loss
        _, later = min((_or_infinite(after), -_missing(mask, kept)) for mask, after in losses.items())
        removed.append(-later)
        kept = _without(kept, -later)
        loss = losses[kept]
    return plan_for(
        context,
        {name: group.first_of(kept) for name, group in context.groups.items()},
        f"{context.loss} added by removing the block, when that was last tried; null where it was not, or not finite",
        _by_list(context, added),
        work,
        {"removed_in_order": removed, "loss": _finite(loss)},
    )


def _without(mask: Mask, block: int) -> Mask:
    return tuple(i for i in mask if i != block)


def _missing(mask: Mask, kept: Mask) -> int:
    """The block that `mask` lacks of `kept`."""
    return next(i for i in kept if i not in mask)


def _ranked(
    context: CriterionContext,
    ranks: Sequence[float],
    scores: Sequence[float],
    meaning: str,
    evaluations: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> PrunePlan:
    """The plan that keeps the blocks of highest rank, of which NaN is the highest. scores: for the plan."""
    order = context.preferred(sorted(range(len(ranks)), key=lambda i: (-_or_infinite(ranks[i]), i)))
    kept = {name: group.first_of(order) for name, group in context.groups.items()}
    work = len(ranks) if evaluations is None else evaluations
    return plan_for(context, kept, meaning, _by_list(context, scores), work, more)


def _by_list(context: CriterionContext, scores: Sequence[float]) -> dict[str, Any]:
    return {name: [_finite(scores[i]) for i in group.blocks] for name, group in context.groups.items()}


def _finite(value: float) -> float | None:
    """None if JSON has no number for it."""
    return float(value) if math.isfinite(value) else None


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


# ------------------------------------------------------------------------------------------------------------------ rules


def by_rule(context: CriterionContext) -> PrunePlan:
    """Keep the blocks that a rule of `RULES` selects, without data."""
    settings = context.settings
    rule = RULES[settings.criterion]
    kept = {name: g.with_protected(rule(g, settings, context.seed)) for name, g in context.groups.items()}
    listed = f", {settings.bk_sdm_list} list" if settings.criterion == "bk-sdm" else ""
    return plan_for(context, kept, f"no scores: a fixed rule{listed}")


def evenly_spaced(size: int, num: int) -> list[int]:
    """`num` evenly spaced positions of `size`, first and last included: round(i (size - 1) / (num - 1)), halves up.

    A single position is the middle one; for an even `size`, the earlier of the two in the middle.
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


# criterion -> the free blocks of a list that stay, by (list, settings, seed)
RULES: dict[str, Callable[[BlockGroup, PruneSection, int], Sequence[int]]] = {
    "bk-sdm": _bk_sdm,
    "first": lambda group, _settings, _seed: group.free[: group.keep_free],
    "last": lambda group, _settings, _seed: group.free[len(group.free) - group.keep_free :],
    # first and last among them; protected blocks do not count
    "uniform": lambda group, _settings, _seed: [group.free[i] for i in evenly_spaced(len(group.free), group.keep_free)],
    "random": _random,
}


def by_named(context: CriterionContext) -> PrunePlan:
    """Exactly the blocks of `prune.keep`, which must name the protected ones too."""
    settings = context.settings
    plan = by_indices(context.teacher, settings.keep, context.seed)
    missing = sorted(set(settings.protect) - set(settings.keep))
    if missing:
        raise UserError(f"--keep leaves out the protected blocks {missing}: name them too, or do not protect them")
    return plan


def by_indices(teacher: LoadedModel, keep: Sequence[int], seed: int = 0) -> PrunePlan:
    """Keep exactly the named blocks; indices count through the lists of blocks in order.

    Raises UserError on indices out of range or named twice, and if a list would be empty.
    """
    if not keep:
        raise UserError("criterion indices wants the blocks to keep: --keep 0,2,4")
    depths = teacher.stack.depths()
    check_range("--keep", keep, depths)
    starts = first_blocks(depths)
    kept = {name: sorted(i - starts[name] for i in keep if 0 <= i - starts[name] < depths[name]) for name in depths}
    with prefixed("--keep", ValueError):
        check_kept(kept, depths)
    return PrunePlan(kept=kept, depth=depths, criterion="indices", seed=seed, teacher=teacher.hash())


# -------------------------------------------------------------------------------------------------- search of whole masks


def by_calibration_loss(context: CriterionContext) -> PrunePlan:
    """The mask of least, median (lower of two) or greatest loss before recovery, among `num_masks` random masks.

    If there are no more than `num_masks` masks, all are evaluated, and min-loss is the optimum of this loss. A
    non-finite loss counts as infinite for the median, and is never the greatest. Source: arXiv 2412.01199, figure 5 and
    table 3. Cost: docs/criteria.md.
    """
    masks, began = searched(context), time.perf_counter()
    sums = context.losses(masks, context.tick, context.begun, context.keep)
    losses = np.nan_to_num(sums.loss / sums.images, nan=np.inf, neginf=np.inf)
    order = np.argsort(losses, kind="stable")
    finite = order[np.isfinite(losses[order])]
    if not len(finite):
        raise UserError("no mask has a finite loss on the calibration images: is the teacher trained?")
    places = {"min-loss": finite[0], "median-loss": order[(len(order) - 1) // 2], "max-loss": finite[-1]}
    chosen = int(places[context.settings.criterion])
    there = space(context)
    depth, listed = context.depth, len(masks) <= MAX_LISTED_MASKS
    table = {"losses": [short(v) for v in losses], "masks": [bits(mask, depth) for mask in masks]}
    facts = {
        "num_masks": len(masks),
        "all_masks": there,
        "exact": there <= context.settings.num_masks,
        "loss": short(losses[chosen]),
    }
    plan = plan_for(
        context,
        {name: [i for i in masks[chosen] if i in group.blocks] for name, group in context.groups.items()},
        f"calibration {context.loss} of whole masks, one bit per block, 1 for kept; null where it is not finite",
        {**facts, **loss_summary(losses[finite]), **(table if listed else {})},
        shared_evaluations(masks),
    )
    plan = dataclasses.replace(plan, cost={**plan.cost, "seconds": time.perf_counter() - began})  # the marks are free
    if context.publish:
        context.publish({**plan.scores, **table, "mse": [short(v) for v in sums.mse / sums.images], **_marks(context)})
    return plan


def searched(context: CriterionContext) -> list[Mask]:
    """The masks that a mask search evaluates, in lexicographic order."""
    masks = random_masks(list(context.groups.values()), context.settings.num_masks, context.seed)
    return [mask for mask in masks if context.allows(mask)]


def space(context: CriterionContext) -> int:
    """Number of all masks that keep the right number of blocks in every list."""
    return math.prod(group.num_candidates for group in context.groups.values())


def _marks(context: CriterionContext) -> dict[str, Any]:
    """Losses of the masks that the cheap criteria select, for those that can keep the same number of blocks."""
    chosen: dict[str, Mask] = {}
    wanted = sum(group.keep for group in context.groups.values())
    for name in _MARKED:
        settings = dataclasses.replace(context.settings, criterion=name, num_keep=None, sensitivity_order="one-shot")
        settings = settings if name == "bk-sdm" else dataclasses.replace(settings, num_keep=context.settings.num_keep)
        try:
            plan = CRITERIA[name].plan(dataclasses.replace(context, settings=settings, tick=lambda done: None))
        except UserError:
            continue
        mask = tuple(global_indices(plan.kept, plan.depth))
        if len(mask) == wanted:
            chosen[name] = mask
    masks = sorted(set(chosen.values()))
    sums = context.losses(masks, prove=False)
    losses = dict(zip(masks, sums.loss / sums.images, strict=True))
    depth = context.depth
    return {
        "marks": {name: short(losses[mask]) for name, mask in chosen.items()},
        "mark_masks": {name: bits(mask, depth) for name, mask in chosen.items()},
    }


# -------------------------------------------------------------------------------------------------------------- the table


def _sensitivity_evaluations(context: CriterionContext) -> int:
    """Block evaluations of `sensitivity` per calibration batch; greedy: estimated as if no block were protected."""
    if context.settings.sensitivity_order == "one-shot":
        return shared_evaluations(_all_but_one(context)[1])
    left, depth = sum(group.keep for group in context.groups.values()), context.depth
    rounds = [list(itertools.combinations(range(size), size - 1)) for size in range(depth, left, -1)]
    return sum(map(shared_evaluations, rounds)) + (1 if rounds else 0)


_PASS = Criterion("", by_change, lambda context: context.depth)
_SEARCH = Criterion("", by_calibration_loss, lambda context: shared_evaluations(searched(context)))
CRITERIA: dict[str, Criterion] = {
    "bi": dataclasses.replace(_PASS, says="block influence", plan=by_block_influence),
    "flux-lite": dataclasses.replace(_PASS, says="squared change of the residual stream"),
    "sensitivity": Criterion("loss added by removing a block", by_sensitivity, _sensitivity_evaluations),
    "bk-sdm": Criterion("first of each pair, then last of each", by_rule),
    "first": Criterion("the first blocks", by_rule),
    "last": Criterion("the last blocks", by_rule),
    "uniform": Criterion("evenly spaced blocks", by_rule),
    "random": Criterion("a random choice", by_rule),
    "min-loss": dataclasses.replace(_SEARCH, says="the mask of least calibration loss"),
    "median-loss": dataclasses.replace(_SEARCH, says="the mask of median calibration loss"),
    "max-loss": dataclasses.replace(_SEARCH, says="the mask of greatest calibration loss"),
    "indices": Criterion("the named blocks", by_named),
    "width": Criterion("channels of the largest |weight x gradient|", by_width, width_evaluations),
}
"""Every criterion but `learned`."""
