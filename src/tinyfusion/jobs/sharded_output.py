"""Shards of the images of an npz in a folder next to it while they are drawn, so that an interrupted job continues.

The folder holds the record of the job and is removed when the npz is complete. Shards are defined once and depend neither on
the number of ranks nor on the time of drawing. Ranks write them as `core/ranks.py` describes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import atomic_write, clear_unfinished, files_in, missing_folders, remove_empty, write_json
from tinyfusion.core.locks import LOCK, Lock, Locked, acquire
from tinyfusion.core.ranks import complete_file, wait_for_files
from tinyfusion.core.rundir import file_output, read_json, stamp
from tinyfusion.data.image_source import ImageSource
from tinyfusion.data.npz import ArrayHeader, npy_batches, npy_header

RECORD = "sampling.json"
Range = tuple[int, int]  # images first .. last - 1
_OURS = r"\.?images-\d{7,}\.npy(?:\.part)?"


def shards_folder(out: Path) -> Path:
    """The folder of the shards of an npz."""
    return out.with_name(f"{out.name}.parts")


@dataclass(frozen=True)
class ImageShards:
    """The shards of an npz of `shape` (N, H, W, C). shard_images: images of every shard but the last.

    Where only a drawn image has a size, `shape` is (N,): then images (H, W, 3) or videos (F, H, W, 3), all of one size.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    shard_images: int

    def ranges(self) -> list[Range]:
        """The images of each shard, in order."""
        num = self.shape[0]
        return [(first, min(first + self.shard_images, num)) for first in range(0, num, self.shard_images)]

    def file(self, shard: Range) -> Path:
        """Path of a shard."""
        return self.folder / f"images-{shard[0]:07d}.npy"

    def is_complete(self, shard: Range) -> bool:
        """Whether a shard exists, with the right header."""
        try:
            header = npy_header(self.file(shard)) if self.file(shard).is_file() else None
        except UserError:
            return False
        image = self.shape[1:]
        if header is not None and not image and len(header.shape) in (4, 5) and header.shape[-1] == 3:
            image = header.shape[1:]
        return header == ArrayHeader((shard[1] - shard[0], *image), self.dtype, fortran=False)

    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image or (F, H, W, 3) of a video. Raises UserError where complete shards differ in it."""
        if self.shape[1:]:
            return self.shape[1:]
        shapes = {npy_header(self.file(shard)).shape[1:] for shard in self.ranges()}
        if len(shapes) > 1:
            sizes = " and ".join(map(str, sorted(shapes)))
            raise UserError(f"the images of {self.folder} have several sizes, {sizes}: give --height and --width")
        return shapes.pop()

    def missing(self) -> list[Range]:
        """Shards that are to be drawn."""
        return [shard for shard in self.ranges() if not self.is_complete(shard)]

    def num_drawn(self) -> int:
        """Images in complete shards."""
        return self.shape[0] - sum(last - first for first, last in self.missing())

    def write(self, shard: Range, images: np.ndarray) -> None:
        """Write a shard. Raises UserError where the folder was removed."""
        with complete_file(self.file(shard)) as temporary, open(temporary, "wb") as file:
            np.save(file, np.ascontiguousarray(images))

    def wait_for(self, shards: Sequence[Range], world: int, timeout_s: float) -> None:
        """Wait until `shards`, of which rank k of `world` draws every world-th from the k-th on, are complete."""
        ranges = {self.file(shard): shard for shard in shards}
        writers = {file: index % world for index, file in enumerate(ranges)}
        wait_for_files(writers, world, timeout_s, lambda file: self.is_complete(ranges[file]))

    def source(self) -> ImageSource:
        """The images of all shards, in order, at most a batch of them in memory."""

        def read(size: int) -> Iterator[np.ndarray]:
            for shard in self.ranges():
                yield from npy_batches(self.file(shard), size)

        shape: Any = (self.shape[0], *self.image_shape())
        return ImageSource(shape, self.dtype, read)

    def remove(self) -> None:
        """Remove all shards, and the record last; `writing_shards` removes the folder unless it holds files of others."""
        clear_unfinished(self.folder)
        for name in files_in(self.folder):
            if re.fullmatch(_OURS, name):
                (self.folder / name).unlink()
        (self.folder / RECORD).unlink(missing_ok=True)


def shard_images(folder: Path, plain: Mapping[str, Any], wanted: int, overwrite: bool) -> int:
    """Images of a shard: those of an interrupted job, else `wanted`.

    plain: the recipe of the job. Raises UserError where the folder is of others, or of another job.
    """
    if not os.path.lexists(folder):
        return wanted
    # a folder with nothing but a lock is of a job that ends just now
    ours = folder.is_dir() and ((folder / RECORD).is_file() or [each.name for each in folder.iterdir()] == [LOCK])
    if not ours:
        raise UserError(f"{folder} is the place of shards of images, and it was not made by tinyfusion: move it away")
    if file_output(folder / RECORD, "sample", plain, overwrite, read_json):
        return wanted
    stored = read_json(folder / RECORD).get("part_images")
    if not isinstance(stored, int) or stored < 1:
        raise UserError(f"{folder}/{RECORD} is damaged: part_images is {stored!r}; --overwrite starts anew")
    return stored


@contextmanager
def writing_shards(shards: ImageShards, plain: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Create the folder with its record, or a new one with `overwrite`, and lock it within the block.

    Raises UserError where another process holds the lock. A folder that is empty at the end is removed.
    """
    created = missing_folders(shards.folder)
    record = stamp("sample", plain, "running", part_images=shards.shard_images)
    lock = _locked(shards.folder, record)
    try:
        shard_images(shards.folder, plain, shards.shard_images, overwrite)
        if overwrite:
            shards.remove()
        else:
            clear_unfinished(shards.folder)
        if not (shards.folder / RECORD).is_file():
            write_json(shards.folder / RECORD, record)
        yield
    finally:
        lock.release()
        remove_empty([shards.folder, *created])


def clear_shards(shards: ImageShards, plain: Mapping[str, Any]) -> None:
    """Remove the shards of a complete npz, which a killed process leaves."""
    if (shards.folder / RECORD).is_file():
        with suppress(Locked), writing_shards(shards, plain, overwrite=False):
            shards.remove()


def _locked(folder: Path, record: dict[str, Any]) -> Lock:
    """The lock of the folder, which is created with its record where it is missing."""
    while True:
        if not os.path.lexists(folder):
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                write_json(temporary / RECORD, record)
        with suppress(FileNotFoundError):  # a job that ended just now has removed it
            return acquire(folder / LOCK, f"draws the images of {folder.with_suffix('')}")
