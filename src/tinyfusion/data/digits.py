"""scikit-learn's 1,797 handwritten digits, 8 x 8, which ship inside that package, split once into 1,437 and 360.

Images are float32 (N, 1, 8, 8) in [-1, 1] (17 grey levels), labels int64. The split is a fixed permutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from tinyfusion.core.rng import Randomness

NUM_TRAINING = 1437
SPLIT_SEED = 0
REAL_SETS = ("digits", "digits:heldout")  # names of the splits


@dataclass(frozen=True)
class ImageSet:
    """Images x (N, C, H, W) float32 in [-1, 1] and labels y (N,) int64."""

    name: str
    x: np.ndarray
    y: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.x)


@cache
def load_digits(heldout: bool = False) -> ImageSet:
    """The training split (1,437) or the held-out split (360) of the digits."""
    from sklearn.datasets import load_digits as bundled

    raw = bundled()
    x = (raw.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    y = raw.target.astype(np.int64)
    order = Randomness(SPLIT_SEED).permutation("digits-split", 0, len(x))
    rows = order[NUM_TRAINING:] if heldout else order[:NUM_TRAINING]
    return ImageSet("digits:heldout" if heldout else "digits", x[rows], y[rows], 10)
