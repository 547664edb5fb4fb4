"""Convert images to tokens of square patches and back, and gather tokens."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def to_tokens(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, S, S) -> (B, L, E): rows of patches, the values of each as (channel, row, column)."""
    return F.pixel_unshuffle(x, patch_size).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, patch_size: int) -> Tensor:
    """The inverse of `to_tokens`."""
    side = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), patch_size)


def taken(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of x (B, N, D) at indices `places` (B, k): (B, k, D)."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
