"""Batches of seeds to images: image i is the same whatever the batch size.

Shapes: B images of a batch, C channels, S input side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.signals import check_stop
from tinyfusion.models.loaded import LoadedModel


@dataclass(frozen=True)
class SampleDraws:
    """The randomness of images `first .. first + num - 1`, addressed by (seed, position, image index).

    Positions count the steps of a trajectory from 0; -1 is what it starts from.
    """

    randomness: Randomness
    first: int
    num: int
    device: torch.device

    def at(self, position: int) -> Draws:
        """The draws of one step."""
        return self.randomness.at(position + 1, self.first, self.num)

    def normal(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal, float32, on the device."""
        return torch.from_numpy(self.at(position).normal("sample-noise", shape)).to(self.device)


class Sampler(Protocol):
    """How a trajectory is made: settings of one process, checked when they are made (ValueError)."""

    @property
    def calls(self) -> int:
        """Forward passes of the network in a trajectory (about, where a solver chooses its steps itself)."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the network's batch per image: 2 under guidance."""
        ...

    @property
    def fixed_steps(self) -> bool:
        """Whether every trajectory calls the network at the same times."""
        ...

    def of_steps(self, num_steps: int) -> Self:
        """The same way of sampling in so few steps, each as costly: what is timed to know the whole."""
        ...

    def describe(self, model: LoadedModel) -> str:
        """Its half of the protocol string."""
        ...

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        """x (B, C, S, S) after every step, in the model's own space, given the condition of B images."""
        ...

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """A call that makes a typical step, to be timed."""
        ...


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples `first ..`: x (B, C, S, S) in the model's own space, and what each was conditioned on."""

    first: int
    x: Tensor
    condition: Condition


def image_labels(
    num_images: int, num_classes: int, seed: int, classes: Sequence[int] = (), balanced: bool = False
) -> np.ndarray:
    """(num_images,) int64: the given classes in turn, else 0, 1, 2, ... in turn if `balanced`, else uniform by image index."""
    if classes or balanced:
        listed = np.array(classes if classes else range(num_classes), dtype=np.int64)
        return listed[np.arange(num_images) % len(listed)]
    return Randomness(seed).at(0, 0, num_images).integers("sample-label", num_classes)


@torch.no_grad()
def sample(
    model: LoadedModel,
    labels: Sequence[int] | np.ndarray,
    sampler: Sampler,
    seed: int,
    batch_size: int = 64,
    first: int = 0,
    last: int | None = None,
    table: Condition | None = None,
) -> Iterator[SampleBatch]:
    """Draw images `first .. last - 1` of those that `labels` (all of them, by image index) name, a batch at a time.

    table: whose rows the labels are; None is the model's own, of its classes.
    Runs where the model is, in the type of its weights; everything but the model is float32. Initial and step noise are
    addressed by (seed, step, image index).
    """
    labels = np.asarray(labels, dtype=np.int64)[:last]
    device = next(model.module.parameters()).device
    table = model.conditions if table is None else table
    for start in range(first, len(labels), batch_size):
        condition = table.index(torch.from_numpy(labels[start : start + batch_size])).to(device)
        draws = SampleDraws(Randomness(seed), start, len(condition), device)
        steps = _watched(sampler.trajectory(model, condition, draws))
        yield SampleBatch(start, deque(steps, maxlen=1).pop(), condition)


def _watched(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same, looking for a signal after each."""
    for x in steps:
        check_stop()
        yield x


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, C, S, S) in [-1, 1] -> uint8 (B, S, S, C): trunc(clamp(127.5 x + 128, 0, 255)), the published rule."""
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
