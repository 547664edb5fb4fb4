"""The calibration set of training-free criteria, and statistics of blocks on it.

Every image has one fixed timestep and noise; timesteps are stratified over the whole chain, labels are not dropped, the
model is in eval mode and float32. All masks of a search are evaluated on the same batches. Shapes: B samples, T tokens,
D width, L blocks of all lists together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion.core.rng import Draws, StratifiedDraws
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import NoisyBatch, Process
from tinyfusion.processes.task import Task

Source = Callable[[int, int, Draws], Any]  # (step, batch size, draws) -> clean batch on the model's device
Tick = Callable[[int], None]  # called with the block evaluations done so far
_DRAWN = "one fixed timestep and noise per image, timesteps stratified over the chain, labels kept, float32"
_GIVEN = "batches of a task, with all that they draw"
_STEP = 2**62  # the address of calibration draws, which no training step has


@dataclass(frozen=True)
class Calibration:
    """Fixed noised batches. images: number of noised images; distinct: number of different clean images among them."""

    batches: tuple[NoisyBatch, ...]
    objective: Process
    data: str
    images: int
    distinct: int
    seed: int

    def record(self) -> dict[str, Any]:
        """The record of the calibration set that a plan stores."""
        return {
            "data": self.data,
            "images": self.images,
            "distinct_images": self.distinct,
            "seed": self.seed,
            "protocol": _GIVEN if isinstance(self.objective, Task) else _DRAWN,
        }


def calibration_set(
    objective: Process, source: Source, data: str, available: int, images: int, batch_size: int, seed: int
) -> Calibration:
    """`images` noised images in batches of at most `batch_size`; the numbers do not depend on the batch size.

    objective: one that drops no labels. available: number of images in the data set. If it has fewer than `images`, all
    of it is repeated, with other timesteps and noise; the last pass may be partial.
    """
    batches = []
    for first in range(0, images, batch_size):
        draws = StratifiedDraws(seed, _STEP, first, min(batch_size, images - first), images, shuffled=True)
        batches.append(objective.draw(source(0, images, draws), draws))
    return Calibration(tuple(batches), objective, data, images, min(images, available), seed)


@dataclass(frozen=True)
class BlockStatistics:
    """How much every block changes its input: cosine and squared difference of input and output, by global index.

    cosine: mean over samples and tokens of cos(output, input) along the width. change: mean over samples, tokens and
    width of (output - input) squared.
    """

    cosine: list[float]
    change: list[float]


@torch.inference_mode()
def block_statistics(model: LoadedModel, calibration: Calibration, clean: bool, tick: Tick) -> BlockStatistics:
    """Statistics of every block on the calibration set. clean: on the inputs of `Process.low_noise` instead."""
    stack = model.stack
    sums = [_Sums() for _ in range(len(stack))]
    model.module.eval()

    def add(block: int, before: Tensor, after: Tensor) -> None:
        sums[block].add(before.float(), after.float())

    with stack.watched(range(len(stack)), add):
        for done, noisy in enumerate(calibration.batches, start=1):
            calibration.objective.predict(model.module, calibration.objective.low_noise(noisy) if clean else noisy)
            tick(done * len(stack))
    return BlockStatistics([_mean(s.cosine, s.tokens) for s in sums], [_mean(s.change, s.values) for s in sums])


def _mean(total: float, num: int) -> float:
    """NaN for a block that no batch ran."""
    return total / num if num else math.nan


@dataclass
class _Sums:
    """Running sums of one block."""

    cosine: float = 0.0
    change: float = 0.0
    tokens: int = 0
    values: int = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in the stream (B, T, D) before and after the block."""
        self.cosine += float(F.cosine_similarity(after, before, dim=-1).sum(-1).cpu().double().sum())
        self.change += float((after - before).square().flatten(1).sum(1).cpu().double().sum())
        self.tokens += before.numel() // before.shape[-1]
        self.values += before.numel()
