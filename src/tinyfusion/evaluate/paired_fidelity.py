"""`evaluate --against`: PSNR and SSIM between the samples of two models with the same seeds."""

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

_PRECISIONS = ("float32", "bfloat16", "float16")  # may differ: noise and labels depend on the seed only
_BATCH_SIZE = 64


def open_pairs(samples: Path, against: Path) -> ImageSource:
    """Open the images of `against`. Raises UserError unless both are npz of `sample` with the same seed, labels and sampler."""
    for path in (samples, against):
        if path.suffix != ".npz":
            raise UserError(f"--against compares an npz of `sample` with another; {path} is none")
    ours, theirs = open_npz(samples), open_npz(against)
    if ours.shape != theirs.shape:
        raise UserError(
            f"--against {against} has images {theirs.shape}, {samples} has {ours.shape}: pairs are of one shape"
        )
    for mine, other in zip_longest(_protocol_fields(samples), _protocol_fields(against)):
        if mine != other and not (_is_precision(mine) and _is_precision(other)):
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


def _is_precision(field: str | None) -> bool:
    """Whether a field of a protocol is the precision: "bfloat16", "float32 compiled"."""
    return field is not None and field.partition(" ")[0] in _PRECISIONS


def _protocol_fields(path: Path) -> list[str]:
    """The fields of the sampling protocol of an npz."""
    record_path = path.with_suffix(".json")
    record: Any = read_json(record_path) if record_path.is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("protocol"), str):
        raise UserError(
            f"{path} has no record of `sample` ({record_path.name}), which has the seed and sampler that decide which images are pairs"
        )
    return [field.strip() for field in record["protocol"].split("|")]


def fidelity(samples: ImageSource, against: ImageSource, path: Path, hash: str) -> dict[str, Any]:
    """Mean and standard deviation of PSNR (dB) and SSIM over pairs, and name, hash and protocol of `against` at `path`."""
    pairs = zip(samples.read(_BATCH_SIZE), against.read(_BATCH_SIZE), strict=True)
    both = np.concatenate([np.stack([psnr_db(a, b), ssim(a, b)]) for a, b in _pixels(pairs)], axis=1)
    means, deviations = both.mean(1), both.std(1)
    return {
        "name": path.name,
        "hash": hash,
        "protocol": " | ".join(_protocol_fields(path)),
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
