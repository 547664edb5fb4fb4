"""The loss of a model without each of its blocks, and the means of paired differences.

Shapes: N noised images, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch

from tinyfusion.blocks.replayed import BlockReplay
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import NoisyBatch, Process

_ALL_BYTES = 2**62  # outputs of all blocks are retained
Tick = Callable[[int], None]  # called with the block evaluations done so far
Keep = Callable[[np.ndarray], None]


def removal_evaluations(depth: int) -> int:
    """Block evaluations of `losses_without` per batch: one pass, then those behind each removed block."""
    return depth + depth * (depth - 1) // 2


@torch.no_grad()
def losses_without(
    model: LoadedModel,
    objective: Process,
    batches: Sequence[NoisyBatch],
    tick: Tick = lambda done: None,
    begun: np.ndarray | None = None,
    keep: Keep = lambda losses: None,
) -> np.ndarray:
    """(L + 1, N) float64: the loss of every noised image by the whole model, then without block 0, 1, ...

    A removed block passes its input on. All rows have the same noise, so differences are paired by column. begun: the first
    columns, of whole batches, if they are known. keep: called with the columns so far.
    """
    depth, done, images = len(model.stack), 0, 0
    columns: list[np.ndarray] = []
    known = np.empty((depth + 1, 0)) if begun is None else begun
    model.module.eval()
    for noisy in batches:
        first, images = images, images + len(noisy)
        if images <= known.shape[1]:
            columns.append(known[:, first:images])
            done += removal_evaluations(depth)
            tick(done)
            continue
        losses = np.empty((depth + 1, len(noisy)))
        with BlockReplay(model.stack, _ALL_BYTES) as replay:
            # the last block first: what comes before a removed block is not computed again
            for removed in range(depth, -1, -1):
                kept = [block for block in range(depth) if block != removed]
                prediction = replay.run(kept, partial(objective.predict, model.module, noisy))
                terms = objective.losses(model.module, noisy, prediction)
                losses[0 if removed == depth else removed + 1] = terms["loss"].cpu().double().numpy()
                done += depth if removed == depth else depth - 1 - removed
                tick(done)
        columns.append(losses)
        keep(np.concatenate(columns, axis=1))
    return np.concatenate(columns, axis=1)


def paired_mean(values: np.ndarray, images: np.ndarray) -> tuple[float, float] | None:
    """The mean of `values` (N,) and its standard error, where several values may belong to one image.

    images: (N,) the image of every value; values of one image are not independent, so the error is that of sums over images
    (the cluster-robust error of a mean; with equally many values per image it is that of the image means). None without values,
    and the error is NaN for a single image.
    """
    if len(values) == 0:
        return None
    _, places = np.unique(images, return_inverse=True)
    mean, num = float(values.mean()), int(places.max()) + 1
    sums = np.bincount(places, weights=values - mean)
    error = float(np.sqrt(np.square(sums).sum() * num / (num - 1)) / len(values)) if num > 1 else float("nan")
    return mean, error


def means_by(values: np.ndarray, images: np.ndarray, parts: Iterable[np.ndarray]) -> list[tuple[float, float] | None]:
    """`paired_mean` of each part. parts: (N,) masks."""
    return [paired_mean(values[part], images[part]) for part in parts]
