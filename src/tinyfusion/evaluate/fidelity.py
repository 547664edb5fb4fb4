"""PSNR, SSIM and LPIPS of pairs of images: samples of two models with the same seeds (`evaluate --against`).

Shapes: N images, H x W pixels, C channels, uint8, channels last.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import correlate1d

from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import comparable_protocol, read_json
from tinyfusion.data.image_source import ImageSource, open_npz, read_labels
from tinyfusion.evaluate.perceptual import Distances

PEAK = 255.0
WINDOW_PX, WINDOW_SIGMA_PX = 11, 1.5
_K1, _K2 = 0.01, 0.03
_PRECISIONS = ("float32", "bfloat16", "float16")  # may differ: noise and labels depend on the seed only
_BATCH_SIZE = 64


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


def open_pairs(samples: Path, against: Path) -> ImageSource:
    """Open the images of `against`. Raises UserError unless both are npz of `sample` with the same seed, labels and sampler."""
    for path in (samples, against):
        if path.suffix != ".npz":
            raise UserError(f"--against compares an npz of `sample` with another; {path} is none")
    ours, theirs = open_npz(samples, videos=True), open_npz(against, videos=True)
    if ours.shape != theirs.shape:
        shapes = f"--against {against} has images {theirs.shape}, {samples} has {ours.shape}"
        raise UserError(f"{shapes}: pairs are of one shape")
    for mine, other in zip_longest(_protocol_fields(samples), _protocol_fields(against)):
        alike = comparable_protocol(mine or "") == comparable_protocol(other or "")
        if not alike and not all((field or "").partition(" ")[0] in _PRECISIONS for field in (mine, other)):
            settings = f"--against {against} was drawn with {other!r}, {samples} with {mine!r}"
            raise UserError(f"{settings}: only images of the same seed, labels and sampler are pairs")
    labels, others = read_labels(samples), read_labels(against)
    if labels is None or others is None or not np.array_equal(labels, others):
        different = f"--against {against} has other labels (arr_1) than {samples}"
        raise UserError(f"{different}: image i must be of one class in both")
    return theirs


def _protocol_fields(path: Path) -> list[str]:
    """The fields of the sampling protocol of an npz."""
    record_path = path.with_suffix(".json")
    record: Any = read_json(record_path) if record_path.is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("protocol"), str):
        missing = f"{path} has no record of `sample` ({record_path.name})"
        raise UserError(f"{missing}, with the seed and sampler that decide which images are pairs")
    return [field.strip() for field in record["protocol"].split("|")]


def fidelity(
    samples: ImageSource, against: ImageSource, path: Path, hash: str, lpips: Distances | None = None
) -> dict[str, Any]:
    """Mean and standard deviation of PSNR (dB) and SSIM over pairs, and name, hash and protocol of `against` at `path`.

    Pairs of videos are those of their frames. lpips: None leaves LPIPS out.
    """
    scores = []
    size = _BATCH_SIZE if samples.first().ndim == 4 else 1
    metrics = {"psnr_db": psnr_db, "ssim": ssim} | ({} if lpips is None else {"lpips": lpips})
    for pair in zip(samples.read(size), against.read(size), strict=True):
        for images in pair:
            if images.dtype != np.uint8:
                raise UserError(f"--against compares uint8 images (0 to 255); got {images.dtype}")
        left, right = (images.reshape(-1, *images.shape[-3:]) for images in pair)
        scores.append(np.stack([metric(left, right) for metric in metrics.values()]))
    values = dict(zip(metrics, np.concatenate(scores, axis=1), strict=True))
    about = {"name": path.name, "hash": hash, "protocol": " | ".join(_protocol_fields(path))}
    means = {name: float(each.mean()) for name, each in values.items()}
    return {**about, **means, **{f"{name}_std": float(each.std()) for name, each in values.items()}}
