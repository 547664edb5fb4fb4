"""Losses of many masks on the same noised images; masks with the same first blocks share their evaluation.

Masks in lexicographic order traverse the tree of their prefixes, and every distinct prefix takes one block evaluation
(`blocks/replayed.py`). Nothing is approximated: losses equal those of the pruned models up to rounding.

Shapes: M masks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from tinyfusion.blocks.replayed import BlockReplay
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import NoisyBatch, Prediction, Process
from tinyfusion.prune.calibrate import Calibration, Tick

B = TypeVar("B", bound=Sized)
Mask = tuple[int, ...]  # kept blocks by global index, ascending
_ALL_BYTES = 2**62  # outputs of all blocks are retained
_ENUMERATED = 4  # a space of at most this many times the sample is enumerated and shuffled
_HISTOGRAM_BINS = 60
_TOLERANCE = 1e-3  # relative, of the losses that a search checks itself on


def all_masks(groups: Sequence[BlockGroup]) -> list[Mask]:
    """Every mask, one choice per list, in lexicographic order."""
    return sorted(
        tuple(itertools.chain(*picked)) for picked in itertools.product(*(group.candidates() for group in groups))
    )


def random_masks(groups: Sequence[BlockGroup], num: int, seed: int) -> list[Mask]:
    """`num` distinct masks drawn uniformly, or all masks if there are at most `num`, in lexicographic order."""
    total = math.prod(group.num_candidates for group in groups)
    if total <= _ENUMERATED * num:
        masks = all_masks(groups)
        order = Randomness(seed).permutation("masks", 0, total) if total > num else range(total)
        return sorted(masks[int(i)] for i in order[:num])
    drawn: dict[Mask, None] = {}
    for turn in itertools.count():
        draws = Randomness(seed).at(turn, 0, num)
        columns = []
        for index, group in enumerate(groups):
            order = np.argsort(draws.uniform(f"masks/{index}", (len(group.free),)), axis=1)[:, : group.keep_free]
            kept = np.array(group.free, dtype=np.int64)[order]
            fixed = np.tile(np.array(group.protected, dtype=np.int64), (num, 1))
            columns.append(np.sort(np.concatenate([kept, fixed], axis=1), axis=1))
        drawn.update(dict.fromkeys(map(tuple, np.concatenate(columns, axis=1).tolist())))
        if len(drawn) >= num:
            break
    return sorted(list(drawn)[:num])


def shared_evaluations(masks: Sequence[Mask]) -> int:
    """Block evaluations per batch with sharing: the number of distinct prefixes, the exact minimum."""
    ordered = sorted(set(masks))
    previous = [(), *ordered[:-1]]
    return sum(len(mask) - shared_prefix(before, mask) for before, mask in zip(previous, ordered, strict=True))


def separate_evaluations(masks: Sequence[Mask]) -> int:
    """Block evaluations per batch without sharing."""
    return sum(map(len, masks))


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two masks."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


@dataclass
class LossSums:
    """Sums over the images of the first `batches` calibration batches, per mask: "loss" and "mse" (M,), float64."""

    loss: np.ndarray
    mse: np.ndarray
    images: int = 0
    batches: int = 0


@torch.no_grad()
def replayed_losses(
    replay: Callable[[], BlockReplay],
    batches: Sequence[B],
    masks: Sequence[Mask],
    evaluate: Callable[[BlockReplay, int, B, Mask], tuple[float, float]],
    tick: Tick = lambda done: None,
    begun: LossSums | None = None,
    keep: Callable[[LossSums], None] = lambda sums: None,
    num_images: Callable[[B], int] = len,
) -> LossSums:
    """Sums over `batches` of the losses of `masks`, which must be distinct and in lexicographic order.

    evaluate: (replay, number of the batch, batch, mask) -> sums of "loss" and "mse" over the batch's images. begun:
    sums to continue from. keep: called with the sums after every batch. tick: called with the number of blocks
    evaluated so far. Raises ValueError on unsorted or repeated masks.
    """
    if any(a >= b for a, b in itertools.pairwise(masks)):
        raise ValueError("masks must be distinct and in lexicographic order")
    sums = begun or LossSums(np.zeros(len(masks)), np.zeros(len(masks)))
    done = sums.batches * shared_evaluations(masks)
    for number, batch in enumerate(batches):
        if number < sums.batches:
            continue
        with replay() as current:
            for position, mask in enumerate(masks):
                loss, mse = evaluate(current, number, batch, mask)
                sums.loss[position] += loss
                sums.mse[position] += mse
                done += len(mask) - shared_prefix(masks[position - 1] if position else (), mask)
                tick(done)
        sums.images += num_images(batch)
        sums.batches += 1
        keep(sums)
    return sums


def mask_losses(
    model: LoadedModel,
    calibration: Calibration,
    masks: Sequence[Mask],
    tick: Tick = lambda done: None,
    begun: LossSums | None = None,
    keep: Callable[[LossSums], None] = lambda sums: None,
    prove: bool = True,
) -> LossSums:
    """Sums of the losses of `masks` over the calibration set; further arguments as in `replayed_losses`.

    prove: first compare the losses of two masks on one batch with those of the pruned models, and raise RuntimeError if
    they differ: a model may pass its blocks arguments that depend on their position. A search of several rounds needs
    this once.
    """
    model.module.eval()
    objective = calibration.objective

    def evaluate(replay: BlockReplay, _number: int, noisy: NoisyBatch, mask: Mask) -> tuple[float, float]:
        return _sums(objective, model, noisy, lambda: replay.run(mask, partial(objective.predict, model.module, noisy)))

    search = partial(replayed_losses, lambda: BlockReplay(model.stack, _ALL_BYTES), evaluate=evaluate)
    if prove:
        tried = sorted({masks[0], masks[-1]})
        first = dataclasses.replace(calibration, batches=calibration.batches[:1])
        losses, plain = search(first.batches, tried).loss, [plain_losses(model, first, mask)[0] for mask in tried]
        if not np.allclose(losses, plain, rtol=_TOLERANCE, equal_nan=True):
            raise RuntimeError(f"blocks of {model.family.name} depend on their position: {losses} is not {plain}")
    return search(calibration.batches, masks, tick=tick, begun=begun, keep=keep)


@torch.no_grad()
def plain_losses(model: LoadedModel, calibration: Calibration, mask: Mask) -> tuple[float, float]:
    """Sums of "loss" and "mse" over the calibration set with only the blocks of `mask` in the model, which is not copied."""
    model.module.eval()
    objective, stack = calibration.objective, model.stack
    indices = iter(range(len(stack)))
    own = {name: stack.block_list(name) for name in stack.lists}
    kept = {name: nn.ModuleList([b for b in blocks if next(indices) in mask]) for name, blocks in own.items()}

    def put(lists: Mapping[str, nn.ModuleList]) -> None:
        for name, blocks in lists.items():
            stack.model.set_submodule(name, blocks)

    try:
        put(kept)
        each = [_sums(objective, model, n, partial(objective.predict, model.module, n)) for n in calibration.batches]
    finally:
        put(own)
    return sum(loss for loss, _ in each), sum(mse for _, mse in each)


def _sums(
    objective: Process, model: LoadedModel, noisy: NoisyBatch, predict: Callable[[], Prediction]
) -> tuple[float, float]:
    """Sums of "loss" and "mse" over the images of a batch; the loss for processes without "mse"."""
    terms = objective.losses(model.module, noisy, predict())
    loss, mse = (float(terms.get(name, terms["loss"]).cpu().double().sum()) for name in ("loss", "mse"))
    return loss, mse


def tick_from(tick: Tick, before: int, done: int) -> None:
    """Call `tick` with the evaluations of this round added to `before`, those of earlier rounds."""
    tick(before + done)


def loss_summary(losses: np.ndarray) -> dict[str, Any]:
    """Quantiles of finite losses, and their histogram in logarithmic bins."""
    shares_below = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
    low, high = float(losses.min()), float(losses.max())
    edges = np.geomspace(low, high, _HISTOGRAM_BINS + 1) if 0 < low < high else np.array([low, max(high, low + 1e-9)])
    edges[0], edges[-1] = low, max(high, edges[-1])
    counts = np.histogram(losses, edges)[0]
    return {
        "quantiles": {name: short(np.quantile(losses, share)) for name, share in shares_below.items()},
        "histogram": {"edges": [short(edge) for edge in edges], "counts": counts.tolist()},
    }


def bits(mask: Mask, depth: int) -> str:
    """A mask as text: one character per block, 1 for kept."""
    kept = set(mask)
    return "".join("1" if i in kept else "0" for i in range(depth))


def short(value: float) -> float | None:
    """The value rounded to six significant digits for JSON; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
