"""Latents in the published layout: `imagenet256_features/7.npy` (2, C, h, w) float32 and `imagenet256_labels/7.npy` (1,).

Row 0 is the picture, row 1 its mirror image, each one sample of the posterior, already scaled. Files match by number.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.data.images import MAX_LABEL
from tinyfusion.data.npz import read_npy

FEATURES = "features:"  # prefix of such a folder
PUBLISHED_SCALE = 0.18215  # the factor in the scripts that write this layout
PUBLISHED_FACTOR = 8  # pixels per latent cell of their autoencoder
_SHOWN = 3
_NUMBERED = re.compile(r"(0|[1-9][0-9]*)\.npy")


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
        values = [read_npy(self.features / f"{i}.npy") for i in range(first, first + num)]
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
    first = read_npy(features / "0.npy")
    if first.dtype != np.float32 or first.ndim != 4 or 0 in first.shape:
        raise UserError(f"{features / '0.npy'} is {first.dtype} {first.shape}: wanted float32 (2, C, h, w)")
    if first.shape[0] > 2:
        wanted = "wanted the latent of one picture and of its mirror image, (2, C, h, w), or the first alone"
        given = f"{features / '0.npy'} has {first.shape[0]} rows {first.shape}"
        raise UserError(f"{given}: {wanted}; for one picture per file extract with a batch size of 1")
    known = np.empty(count, np.int64)
    for i in range(count):
        path = labels / f"{i}.npy"
        value = read_npy(path)
        if value.size != 1 or value.dtype.kind not in "iu" or not 0 <= int(value.flat[0]) <= MAX_LABEL:
            given = f"{path} is {value.dtype} {value.shape}{f' {value.flat[0]}' if value.size == 1 else ''}"
            raise UserError(f"{given}: wanted one whole number from 0 to {MAX_LABEL:,}")
        known[i] = int(value.flat[0])
    digest = hashlib.sha256(known.astype("<i8").tobytes() + repr(first.shape).encode()).hexdigest()
    rows, channels, height, width = first.shape
    return PublishedLatents(features, known, (rows, channels, height, width), digest)


def _folders(folder: Path) -> tuple[Path, Path]:
    matching = sorted(folder.glob("*_features")) if folder.is_dir() else []
    if len(matching) != 1 or not matching[0].is_dir():
        names = ", ".join(path.name for path in matching) or "none"
        raise UserError(
            f"{folder}: wanted one folder NAME_features, as imagenet256_features, and NAME_labels; got {names}"
        )
    labels = matching[0].with_name(matching[0].name.removesuffix("_features") + "_labels")
    if not labels.is_dir():
        raise UserError(f"{labels} does not exist: wanted the labels of {matching[0].name}")
    return matching[0], labels


def _numbers(folder: Path) -> int:
    """Number of files 0.npy, 1.npy, ... Raises UserError on gaps."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".npy")]
    odd = min((name for name in names if not _NUMBERED.fullmatch(name)), default=None)
    if odd is not None:
        raise UserError(f"{folder} holds {odd}: wanted 0.npy, 1.npy, ...")
    if not names:
        raise UserError(f"{folder} holds no 0.npy, 1.npy, ...")
    numbers = {int(name.removesuffix(".npy")) for name in names}
    if missing := max(numbers) + 1 - len(numbers):
        gaps = itertools.islice((i for i in itertools.count() if i not in numbers), min(missing, _SHOWN))
        shown = ", ".join(f"{i}.npy" for i in gaps)
        raise UserError(f"{folder} has gaps: {shown}{' ...' * (missing > _SHOWN)} of {max(numbers) + 1:,} missing")
    return len(numbers)
