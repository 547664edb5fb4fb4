"""Image sets to training batches: exact shuffling over epochs, addressed augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.digits import ImageSet


@dataclass(frozen=True)
class ArrayBatch:
    """x (B, C, H, W) float32, y (B,) int64; what `processes.base.Batch` asks for."""

    x: Tensor
    y: Tensor


class ShuffledBatches:
    """Batches of an image set; every image once per epoch, in an order addressed by (seed, epoch).

    Source of (step, batch size, draws) -> batch on `device`; holds nothing that would have to be saved.
    """

    def __init__(
        self, images: ImageSet, randomness: Randomness, device: torch.device, augment: float = 0.0, flip: float = 0.0
    ) -> None:
        self.x = torch.from_numpy(images.x)
        self.y = torch.from_numpy(images.y)
        self.randomness = randomness
        self.device = device
        self.augment = augment
        self.flip = flip
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            if len(self._orders) > 4:
                self._orders.clear()
            self._orders[epoch] = torch.from_numpy(self.randomness.permutation("epoch", epoch, len(self.x)))
        return self._orders[epoch]

    def __call__(self, step: int, batch_size: int, draws: Draws) -> ArrayBatch:
        """The images of `step`."""
        first, size = step * batch_size + draws.first, len(self.x)
        end = first + draws.num
        epochs = range(first // size, -(-end // size))  # those that the batch touches
        rows = torch.cat([self._order(e)[max(first - e * size, 0) : end - e * size] for e in epochs])
        x = self.x[rows]
        if self.augment:
            x = jitter(x, draws, self.augment)
        if self.flip:
            mirrored = torch.from_numpy(draws.uniform("flip") < self.flip)
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
        return ArrayBatch(x.to(self.device), self.y[rows].to(self.device))


def jitter(x: Tensor, draws: Draws, share: float) -> Tensor:
    """Turn (8 degrees at most), scale (7 %), shear (0.15) and shift (a twentieth of the side) a `share` of images.

    x: (B, C, H, W) in [-1, 1], and so is what comes back. Bicubic, the outside counts as -1.
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
