"""Features of a DINOv2 network for FD-DINOv2, their Frechet distance (arXiv 2306.04675).

Pictures are resized to 224 x 224 (bicubic, antialiased) and normalised as in training; the feature is the class token
after the last norm. Without maps and classes there is no sFID and no Inception Score.
Differs: the published evaluation resizes with Pillow in 8 bits; this one in float32, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.evaluate.features import Features, hash_state
from tinyfusion.evaluate.inception import as_rgb, check_pictures, full_float32, treatment_of

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, pixels in [0, 1]


class DinoFeatures:
    """`FeatureExtractor` of a DINOv2 network. class_token: (N, 3, 224, 224) to (N, D), by the weights of `network`."""

    slow = True

    def __init__(
        self,
        name: str,
        network: nn.Module,
        class_token: Callable[[Tensor], Tensor],
        device: torch.device,
        batch_size: int = 64,
    ) -> None:
        self.name = name
        self.hash = hash_state(network.state_dict())
        network.to(device).eval().requires_grad_(False)
        self.class_token, self.device, self.batch_size = class_token, device, batch_size

    def check(self, images: np.ndarray, what: str) -> None:
        """Raise UserError unless `images` are uint8 (N, H, W, 1 or 3)."""
        check_pictures(images, what, self.name)

    def treatment(self, shape: tuple[int, int, int]) -> str:
        """Preprocessing of images (H, W, C), for the protocol."""
        return treatment_of(shape, SIDE, "bicubic")

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images (N, H, W, 1 or 3); `spatial` and `logits` are None."""
        self.check(images, "images")
        with full_float32():
            batches = [
                self._tokens(images[first : first + self.batch_size])
                for first in range(0, max(len(images), 1), self.batch_size)
            ]
        return Features(np.concatenate(batches), None, None)

    def _tokens(self, images: np.ndarray) -> np.ndarray:
        pixels = as_rgb(images, self.device)
        if pixels.shape[2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        mean, deviation = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, DEVIATION))
        return self.class_token((pixels / 255 - mean) / deviation).cpu().numpy()
