"""Features of a DINOv2 network for FD-DINOv2, their Frechet distance (arXiv 2306.04675).

Pictures are resized to 224 x 224 (bicubic, antialiased) and normalised as in training; the feature is the class token
after the last norm. Without maps and classes there is no sFID and no Inception Score.
Differs: the published evaluation resizes with Pillow in 8 bits; this one in float32, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.evaluate.features import FeatureExtractor

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, pixels in [0, 1]


class DinoFeatures(FeatureExtractor):
    """`FeatureExtractor` of a DINOv2 network. class_token: (N, 3, 224, 224) to (N, D), by the weights of `network`."""

    side, rule = SIDE, "bicubic"

    def __init__(
        self,
        name: str,
        network: nn.Module,
        class_token: Callable[[Tensor], Tensor],
        device: torch.device,
        batch_size: int = 64,
    ) -> None:
        super().__init__(name, network, device, batch_size)
        self.class_token = class_token

    def features_of(self, pixels: Tensor) -> tuple[Tensor, None, None]:
        """As in `FeatureExtractor`."""
        pixels = pixels.expand(-1, 3, -1, -1)
        if pixels.shape[2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        mean, deviation = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, DEVIATION))
        return self.class_token((pixels / 255 - mean) / deviation), None, None
