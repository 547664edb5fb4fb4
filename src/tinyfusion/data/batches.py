"""Image sets to training batches: exact shuffling over epochs, addressed augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion.conditioning.classes import class_table
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.digits import ImageSet

LOOKED_AT = 64  # latents whose scale is checked
_NEAR_ONE = (0.5, 2.0)  # standard deviations of latents without a remark


@dataclass(frozen=True)
class ArrayBatch:
    """x (B, C, H, W) float32, of videos (B, C, F, H, W), and the condition of every image (a `processes.base.Batch`)."""

    x: Tensor
    condition: Condition


class Batches:
    """Source of (step, batch size, draws) -> batch on `device`: the images of a sequence, flipped and jittered.

    The sequence goes through a set once per epoch, in an order addressed by (seed, epoch); a subclass gives its rows. Step s has
    the positions from s x batch size on, of which `draws` selects those of this process. There is no state to save. augment:
    share of images that `jitter` moves; flip: probability of mirroring left to right. A label is a row of a table: a class,
    unless `conditioned_on` is called.
    """

    classes: int  # one more than the largest label
    shape: tuple[int, ...]  # (C, H, W) of every image, or (C, F, H, W)

    def __init__(self, randomness: Randomness, device: torch.device, augment: float = 0.0, flip: float = 0.0) -> None:
        self.randomness, self.device, self.augment, self.flip = randomness, device, augment, flip
        self._table: Condition | None = None

    def conditioned_on(self, table: Condition) -> Self:
        """The same batches, whose labels are rows of `table`; its null row moves to the device."""
        null = table.null_row and {name: row.to(self.device) for name, row in table.null_row.items()}
        self._table = Condition(table.tensors, null)
        return self

    def __len__(self) -> int:
        """Images of the set."""
        raise NotImplementedError

    def rows(self, first: int, num: int) -> tuple[Tensor, Tensor]:
        """x (num, C, H, W) float32 and labels (num,) int64 of positions `first` to `first + num - 1` of the sequence."""
        raise NotImplementedError

    def __call__(self, step: int, batch_size: int, draws: Draws) -> ArrayBatch:
        """The images of `step`."""
        x, y = self.rows(step * batch_size + draws.first, draws.num)
        if self.augment:
            x = jitter(x, draws, self.augment)
        if self.flip:
            mirrored = torch.from_numpy(draws.uniform("flip") < self.flip)
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        return self._batch(x, y)

    def _batch(self, x: Tensor, labels: Tensor) -> ArrayBatch:
        """The batch of images x and their labels, on the device."""
        if self._table is None:
            self.conditioned_on(class_table(self.classes))
        assert self._table is not None
        return ArrayBatch(self._moved(x), self._table.index(labels).each(self._moved))

    def _moved(self, values: Tensor) -> Tensor:
        """On the device; from pinned memory the copy overlaps with computation."""
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


class ShuffledRows(Batches):
    """The sequence of an exactly shuffled set. A subclass gives the images. purpose: the address of its order."""

    purpose = "epoch"

    def __init__(self, randomness: Randomness, device: torch.device, augment: float = 0.0, flip: float = 0.0) -> None:
        super().__init__(randomness, device, augment, flip)
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:
            order = torch.from_numpy(self.randomness.permutation(self.purpose, epoch, len(self)))
            self._orders = {**dict(list(self._orders.items())[-3:]), epoch: order}
        return order

    def picked(self, first: int, num: int) -> Tensor:
        """(num,) int64: the rows of the set at positions `first` to `first + num - 1` of the sequence."""
        end, size = first + num, len(self)
        epochs = range(first // size, -(-end // size))  # those that the batch touches
        return torch.cat([self._order(e)[max(first - e * size, 0) : end - e * size] for e in epochs])


class ShuffledBatches(ShuffledRows):
    """Batches of an image set in memory, in an exactly shuffled order."""

    def __init__(
        self, images: ImageSet, randomness: Randomness, device: torch.device, augment: float = 0.0, flip: float = 0.0
    ) -> None:
        super().__init__(randomness, device, augment, flip)
        self.x = torch.from_numpy(images.x)
        self.y = torch.from_numpy(images.y)
        self.classes = images.num_classes
        self.shape = (images.x.shape[1], images.x.shape[2], images.x.shape[3])

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, first: int, num: int) -> tuple[Tensor, Tensor]:
        """As in `Batches`."""
        rows = self.picked(first, num)
        return self.x[rows], self.y[rows]


def signed(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) float32 of (N, H, W, C): uint8 pixels in [-1, 1], floats as they are."""
    x = images.astype(np.float32).transpose(0, 3, 1, 2)
    return x / 127.5 - 1.0 if images.dtype == np.uint8 else x


def scale_remarks(x: Tensor, name: str) -> list[str]:
    """A line about latents x, as models see them, if their standard deviation is far from 1."""
    deviation = float(x.double().std()) if x.numel() > 1 else 1.0
    if _NEAR_ONE[0] <= deviation <= _NEAR_ONE[1]:
        return []
    measured = f"the latents have a standard deviation of {deviation:.3g} where models expect about 1"
    return [f"{name}: {measured}: were they multiplied by the scaling factor of their autoencoder, once?"]


def jitter(x: Tensor, draws: Draws, share: float) -> Tensor:
    """Turn (8 degrees at most), scale (7 %), shear (0.15) and shift (a twentieth of the side) a `share` of images.

    x and result: (B, C, H, W) in [-1, 1]. Bicubic; the outside counts as -1.
    """
    u = torch.from_numpy(draws.uniform("augment", (6,))).float() * 2 - 1
    on = ((u[:, 5] + 1) / 2 < share).float()
    angle = u[:, 0] * math.radians(8) * on
    scale_x, scale_y = 1 + 0.07 * u[:, 1] * on, 1 + 0.07 * u[:, 2] * on
    shear, shift = 0.15 * u[:, 3] * on, 0.1 * u[:, 4] * on
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [
        torch.stack([cos * scale_x, (shear - sin) * scale_y, shift], 1),
        torch.stack([sin * scale_x, cos * scale_y, zero], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
    return torch.where(on.view(-1, 1, 1, 1) > 0, moved, x)
