"""PSNR and SSIM of pairs of images, in float64, for images of two models from the same noise.

Shapes: N images, H x W pixels, C channels, uint8, channels last.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

PEAK = 255.0
WINDOW_PX, WINDOW_SIGMA_PX = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr_db(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) peak signal-to-noise ratio 10 log10(255^2 / mean squared error) of every pair, in dB.

    Equal images, whose value would be infinite, count as if one value differed by one level. Raises ValueError if shapes
    differ.
    """
    _check(left, right)
    errors = ((left.astype(np.float64) - right) ** 2).mean((1, 2, 3))
    least = 1.0 / np.prod(left.shape[1:])
    decibels: np.ndarray = 10 * np.log10(PEAK**2 / np.maximum(errors, least))
    return decibels


def ssim(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) mean structural similarity (SSIM) of every pair, at most 1; equal to 1 only for equal images.

    Gaussian window of 11 pixels and sigma 1.5, K1 0.01, K2 0.03, only where the window is inside the picture; mean over
    positions and channels. Raises ValueError if shapes differ.
    Source: Wang, Bovik, Sheikh, Simoncelli, 2004, section III.
    Differs: computed per channel; the paper has grey pictures. Pictures below 11 pixels get the largest odd
    window that fits.
    """
    _check(left, right)
    x, y = left.astype(np.float64), right.astype(np.float64)
    side = min(WINDOW_PX, *(size - (size + 1) % 2 for size in left.shape[1:3]))
    places = np.arange(side) - side // 2
    window = np.exp(-(places**2) / (2 * WINDOW_SIGMA_PX**2))
    window /= window.sum()

    def local(values: np.ndarray) -> np.ndarray:
        """Weighted mean around every pixel whose window is inside the picture."""
        for axis in (1, 2):
            values = correlate1d(values, window, axis=axis, mode="constant")
            inside = slice(side // 2, values.shape[axis] - side // 2)
            values = values[:, inside] if axis == 1 else values[:, :, inside]
        return values

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * PEAK) ** 2, (_K2 * PEAK) ** 2
    similar = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * (2 * covariance + c2) / (variances + c2)
    means: np.ndarray = similar.mean((1, 2, 3))
    return means


def _check(left: np.ndarray, right: np.ndarray) -> None:
    if left.shape != right.shape or left.ndim != 4:
        raise ValueError(f"pairs of images have one shape (N, H, W, C); got {left.shape} and {right.shape}")
