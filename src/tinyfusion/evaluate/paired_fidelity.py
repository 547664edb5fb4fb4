"""`evaluate --against`: how close images are to those that another model drew from the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json
from tinyfusion.data.image_source import ImageSource, open_npz, read_labels
from tinyfusion.evaluate.fidelity import psnr_db, ssim

_PRECISIONS = ("float32", "bfloat16", "float16")  # may differ: noise and labels are those of the seed
_PAIRS = 64  # at a time


def open_pairs(samples: Path, against: Path) -> ImageSource:
    """The images of `against`. Raises UserError unless both are npz of `sample`, made from one seed, labels and sampler."""
    for path in (samples, against):
        if path.suffix != ".npz":
            raise UserError(f"--against compares an npz of `sample` with another; {path} is none")
    ours, theirs = open_npz(samples), open_npz(against)
    if ours.shape != theirs.shape:
        raise UserError(
            f"--against {against} has images {theirs.shape}, {samples} has {ours.shape}: pairs are of one shape"
        )
    for mine, other in zip_longest(_parts(samples), _parts(against)):
        if mine != other and not (_is_arithmetic(mine) and _is_arithmetic(other)):
            raise UserError(
                f"--against {against} was drawn with {other!r}, {samples} with {mine!r}: only images of the same seed, labels "
                "and sampler are pairs"
            )
    labels, others = read_labels(samples), read_labels(against)
    if labels is None or others is None or not np.array_equal(labels, others):
        raise UserError(
            f"--against {against} has other labels (arr_1) than {samples}: image i must be of one class in both"
        )
    return theirs


def _is_arithmetic(part: str | None) -> bool:
    """Whether a part of a protocol says how numbers are computed: "bfloat16", "float32 compiled"."""
    return part is not None and part.partition(" ")[0] in _PRECISIONS


def _parts(path: Path) -> list[str]:
    """The sampling protocol of an npz, in parts."""
    beside = path.with_suffix(".json")
    record: Any = read_json(beside) if beside.is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("protocol"), str):
        raise UserError(
            f"{path} has no record of `sample` beside it ({beside.name}): without seed and sampler nobody knows which images are pairs"
        )
    return [part.strip() for part in record["protocol"].split("|")]


def fidelity(samples: ImageSource, against: ImageSource, path: Path, hash: str) -> dict[str, Any]:
    """Mean PSNR (dB) and SSIM over pairs, each with its standard deviation, and how the others at `path` were drawn."""
    pairs = zip(samples.read(_PAIRS), against.read(_PAIRS), strict=True)
    both = np.concatenate([np.stack([psnr_db(a, b), ssim(a, b)]) for a, b in _pixels(pairs)], axis=1)
    means, deviations = both.mean(1), both.std(1)
    return {
        "name": path.name,
        "hash": hash,
        "protocol": " | ".join(_parts(path)),
        "psnr_db": float(means[0]),
        "psnr_db_std": float(deviations[0]),
        "ssim": float(means[1]),
        "ssim_std": float(deviations[1]),
    }


def _pixels(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for left, right in pairs:
        for images in (left, right):
            if images.dtype != np.uint8:
                raise UserError(f"--against compares uint8 images (0 to 255); got {images.dtype}")
        yield left, right
