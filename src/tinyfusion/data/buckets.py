"""Latents in buckets of one size each, and training batches of them: every batch is from a single bucket.

A set of buckets is a folder with a manifest, which lists the folders of its sets of latents (`data/latents.py`). Labels of all
count through one table.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.reading import read_json
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import write_json
from tinyfusion.data.batches import ArrayBatch, Batches
from tinyfusion.data.latents import FORMAT_VERSION, MANIFEST, LatentBatches, LatentSet, open_latents

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_MOST = 1000  # buckets of a set


def parse_size(text: str, field: str) -> tuple[int, int]:
    """(height, width) of a text such as 832x1216. Raises UserError where it is none."""
    match = _SIZE.fullmatch(text.strip())
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < 1 or max(size) > 2**16:
        raise UserError(f"{field} wants sizes in pixels, HEIGHTxWIDTH, such as 832x1216; got {text!r}")
    return size


def bucket_name(size: tuple[int, int]) -> str:
    """The folder of a bucket of pictures of (height, width)."""
    return f"bucket-{size[0]}x{size[1]}"


def nearest_bucket(picture: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """The bucket of a picture of (height, width): of nearest aspect ratio, compared as logarithms.

    Of several with one ratio the largest that the picture covers, else the smallest; then the first.
    """
    ratio = math.log(picture[0] / picture[1])

    def key(index: int) -> tuple[float, bool, int, int]:
        height, width = sizes[index]
        distance = round(abs(math.log(height / width) - ratio), 9)
        covered = picture[0] >= height and picture[1] >= width
        return distance, not covered, -height * width if covered else height * width, index

    return min(range(len(sizes)), key=key)


@dataclass(frozen=True)
class _Bucket:
    """An entry of the manifest."""

    folder: str
    num_images: int


@dataclass(frozen=True)
class _Manifest:
    """The fields of the manifest that are read."""

    buckets: list[_Bucket]


def write_bucket_manifest(folder: Path, nums: Mapping[str, int], about: Mapping[str, Any]) -> None:
    """Write the manifest of finished buckets. nums: images by folder; about: more fields, to read and to check."""
    buckets = [{"folder": name, "num_images": num} for name, num in nums.items()]
    values = {"made_by": "tinyfusion", "format_version": FORMAT_VERSION, "buckets": buckets, **about}
    write_json(folder / MANIFEST, values)


def is_bucketed(folder: Path) -> bool:
    """Whether a folder of latents has buckets."""
    path = folder / MANIFEST
    values = read_json(path) if path.is_file() else None
    return isinstance(values, dict) and values.get("made_by") == "tinyfusion" and "buckets" in values


def facts_folder(folder: Path) -> Path:
    """The folder with the manifest of latents in a set: its own or, of buckets, that of the first."""
    if not is_bucketed(folder):
        return folder
    names = [entry.get("folder") for entry in read_json(folder / MANIFEST)["buckets"] if isinstance(entry, dict)]
    return folder / str(names[0]) if names else folder


def open_buckets(folder: Path) -> dict[str, LatentSet]:
    """The sets of all buckets, by folder. Raises UserError where one is missing or damaged, or is of another autoencoder."""
    values = read_json(folder / MANIFEST)
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST} has format_version {version}; this version reads {FORMAT_VERSION}: upgrade"
        )
    with prefixed(f"{folder / MANIFEST} is damaged"):
        buckets = build_known(_Manifest, values, "").buckets
    names = [bucket.folder for bucket in buckets]
    sound = all(name.startswith("bucket-") and _SIZE.fullmatch(name.removeprefix("bucket-")) for name in names)
    if not 1 <= len(names) <= _MOST or len({*names}) < len(names) or not sound:
        raise UserError(f"{folder / MANIFEST} is damaged: its buckets are no list of different folders of sizes")
    sets = {name: open_latents(folder / name) for name in names}
    for bucket in buckets:
        if len(sets[bucket.folder]) != bucket.num_images:
            raise UserError(
                f"{folder / MANIFEST} is damaged: {bucket.folder} has {len(sets[bucket.folder]):,} images, not {bucket.num_images:,}"
            )
    first, *others = sets.values()
    for other in others:
        same = (other.spec.shape[0], other.spec.kind, other.spec.scale, other.spec.shift, other.spec.rows)
        if same != (first.spec.shape[0], first.spec.kind, first.spec.scale, first.spec.shift, first.spec.rows):
            raise UserError(
                f"{other.folder} does not go with {first.folder}: they are of other autoencoders or settings"
            )
    return sets


class BucketOrder:
    """The buckets of all steps, as `BucketBatches` describes them. nums: (buckets,) int64, images of each."""

    def __init__(self, nums: np.ndarray, randomness: Randomness) -> None:
        self.nums, self.randomness = nums, randomness
        self._batches_before = lru_cache(maxsize=64)(self._counted)
        self._order = lru_cache(maxsize=4)(self._ordered)

    def bucket_of(self, step: int, batch_size: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches of it came before."""
        # the epoch: the last one that begins at or before the step
        few = step * batch_size // int(self.nums.sum())
        epochs = range(few, few + len(self.nums) * batch_size // int(self.nums.sum()) + 2)
        epoch = epochs[bisect_right(epochs, step, key=lambda e: int(self._batches_before(e, batch_size).sum())) - 1]
        before = self._batches_before(epoch, batch_size)
        order, place = self._order(epoch, batch_size), step - int(before.sum())
        bucket = int(order[place])
        return bucket, int(before[bucket]) + int((order[:place] == bucket).sum())

    def _counted(self, epoch: int, batch_size: int) -> np.ndarray:
        """(buckets,) batches before an epoch."""
        return epoch * self.nums // batch_size

    def _ordered(self, epoch: int, batch_size: int) -> np.ndarray:
        """The buckets of an epoch's batches."""
        counts = self._batches_before(epoch + 1, batch_size) - self._batches_before(epoch, batch_size)
        every = np.repeat(np.arange(len(counts)), counts)
        return every[self.randomness.permutation("epoch/buckets", epoch, len(every))] if len(every) else every


class BucketBatches(Batches):
    """Training batches of several sets of latents, each from one of them; a set's images in its own exactly shuffled order.

    An epoch takes so many batches of each bucket as bring its total to floor(epochs x images / batch size): what an epoch leaves
    over, fewer images than a batch, comes first in the next epoch, so that no image is left out and none comes before all others of
    its bucket have. The order of batches within an epoch is random. All of it is a function of seed, batch size and step.

    rows: of the largest bucket. shape: that of the largest bucket.
    """

    def __init__(
        self, sets: Mapping[str, LatentSet], randomness: Randomness, device: torch.device, flip: float = 0.0
    ) -> None:
        super().__init__(randomness, device, flip=flip)
        self.buckets = [_Ordered(name, latents, randomness, device, flip) for name, latents in sets.items()]
        self.largest = max(self.buckets, key=len)
        self.classes, self.shape = max(bucket.classes for bucket in self.buckets), self.largest.shape
        self.shapes = tuple(bucket.shape for bucket in self.buckets)
        self.order = BucketOrder(np.array([len(bucket) for bucket in self.buckets], np.int64), randomness)

    def conditioned_on(self, table: Any) -> BucketBatches:
        """As in `Batches`."""
        for bucket in self.buckets:
            bucket.conditioned_on(table)
        return super().conditioned_on(table)

    @property
    def latents(self) -> LatentSet:
        """The largest bucket: kind, scale and shift are those of all."""
        return self.largest.latents

    def __len__(self) -> int:
        return int(self.order.nums.sum())

    def rows(self, first: int, num: int) -> tuple[Tensor, Tensor]:
        """As in `Batches`, of the largest bucket."""
        return self.largest.rows(first, num)

    def __call__(self, step: int, batch_size: int, draws: Draws) -> ArrayBatch:
        """The latents of `step`."""
        bucket, number = self.order.bucket_of(step, batch_size)
        return self.buckets[bucket].at(number * batch_size + draws.first, draws)


class _Ordered(LatentBatches):
    """A bucket, whose order has an address of its own."""

    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.purpose = f"epoch/{name}"
