"""Latents in the published layout: `imagenet256_features/7.npy` (2, C, h, w) float32 and `imagenet256_labels/7.npy` (1,).

Row 0 is the picture, row 1 its mirror image, each one sample of the posterior, already scaled. Files go together by their
number, whatever order a folder lists them in.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyfusion.core.errors import UserError

FEATURES = "features:"  # prefix of such a folder
PUBLISHED_SCALE = 0.18215  # the factor in the scripts that write this layout
PUBLISHED_FACTOR = 8  # pixels per latent cell of their autoencoder
_SHOWN = 3


@dataclass(frozen=True)
class PublishedLatents:
    """labels (N,) int64; shape (R, C, h, w) of every file; fingerprint: SHA-256 over number and labels."""

    features: Path
    labels: np.ndarray
    shape: tuple[int, int, int, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, first: int, num: int) -> Tensor:
        """(num, R, C, h, w) float32. Raises UserError on a damaged file, another shape, NaN."""
        values = [_array(self.features / f"{i}.npy") for i in range(first, first + num)]
        for i, value in enumerate(values, first):
            path = self.features / f"{i}.npy"
            if value.dtype != np.float32 or value.shape != self.shape:
                raise UserError(f"{path} is {value.dtype} {value.shape}; 0.npy is float32 {self.shape}")
            if not np.isfinite(value).all():
                raise UserError(f"{path} has values that are not finite (NaN or infinity)")
        return torch.from_numpy(np.stack(values))


def open_published(folder: Path) -> PublishedLatents:
    """Both folders, every label and the first file. Raises UserError on gaps, counts that differ, odd shapes."""
    features, labels = _folders(folder)
    count = _numbers(features)
    if (other := _numbers(labels)) != count:
        raise UserError(f"{features} has {count:,} files and {labels} {other:,}: wanted one label per file")
    first = _array(features / "0.npy")
    if first.dtype != np.float32 or first.ndim != 4 or first.shape[0] not in (1, 2):
        raise UserError(f"{features / '0.npy'} is {first.dtype} {first.shape}: wanted float32 (2, C, h, w)")
    known = np.empty(count, np.int64)
    for i in range(count):
        value = _array(labels / f"{i}.npy")
        if value.size != 1 or value.dtype.kind not in "iu" or int(value.flat[0]) < 0:
            raise UserError(f"{labels / f'{i}.npy'} is {value.dtype} {value.shape}: wanted one whole number from 0")
        known[i] = int(value.flat[0])
    digest = hashlib.sha256(known.astype("<i8").tobytes() + repr(first.shape).encode()).hexdigest()
    rows, channels, height, width = first.shape
    return PublishedLatents(features, known, (rows, channels, height, width), digest)


def _folders(folder: Path) -> tuple[Path, Path]:
    found = sorted(folder.glob("*_features")) if folder.is_dir() else []
    if len(found) != 1 or not found[0].is_dir():
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder} wants one folder NAME_features, as imagenet256_features, and NAME_labels; got {names}"
        )
    labels = found[0].with_name(found[0].name.removesuffix("_features") + "_labels")
    if not labels.is_dir():
        raise UserError(f"{labels} does not exist: wanted the labels of {found[0].name}")
    return found[0], labels


def _numbers(folder: Path) -> int:
    """How many files 0.npy, 1.npy, ... there are. Raises UserError on gaps."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".npy")]
    numbers = {int(stem) for name in names if (stem := name[:-4]).isdigit() and str(int(stem)) == stem}
    if len(numbers) != len(names):
        odd = sorted(name for name in names if not name[:-4].isdigit() or str(int(name[:-4])) != name[:-4])
        raise UserError(f"{folder} holds {odd[0]}: wanted 0.npy, 1.npy, ...")
    if not numbers:
        raise UserError(f"{folder} holds no 0.npy, 1.npy, ...")
    if missing := sorted(set(range(max(numbers) + 1)) - numbers):
        shown = ", ".join(f"{i}.npy" for i in missing[:_SHOWN])
        raise UserError(f"{folder} has gaps: {shown}{' ...' * (len(missing) > _SHOWN)} of {max(numbers) + 1:,} missing")
    return len(numbers)


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a plain array: {error}") from error
