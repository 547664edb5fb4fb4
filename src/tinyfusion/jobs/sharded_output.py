"""Images on their way to an npz: one file per part, addressed by image index, so that an interrupted job continues.

Their folder is next to the npz, holds the record of the job, and is removed when the npz is complete. Parts are laid out
once, and do not depend on how many processes draw them, or when.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import (
    atomic_write,
    clear_unfinished,
    files_in,
    missing_folders,
    remove_empty,
    write_json,
)
from tinyfusion.core.locks import LOCK, Lock, Locked, acquire
from tinyfusion.core.rundir import file_output, read_json, stamp
from tinyfusion.core.signals import check_stop
from tinyfusion.data.image_source import ImageSource
from tinyfusion.data.npz import ArrayHeader, npy_batches, npy_header

RECORD = "sampling.json"
Range = tuple[int, int]  # images first .. last - 1
_LOOK_EVERY_S = 0.05
_OURS = r"images-\d{7,}\.npy"


def parts_folder(out: Path) -> Path:
    """Where the parts of an npz are kept."""
    return out.with_name(f"{out.name}.parts")


@dataclass(frozen=True)
class Parts:
    """shape: (N, H, W, C) of the npz. part_images: images of every part but the last."""

    folder: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype[np.generic]
    part_images: int

    def ranges(self) -> list[Range]:
        """All parts, in order."""
        num = self.shape[0]
        return [(first, min(first + self.part_images, num)) for first in range(0, num, self.part_images)]

    def file(self, part: Range) -> Path:
        """Path of a part."""
        return self.folder / f"images-{part[0]:07d}.npy"

    def is_there(self, part: Range) -> bool:
        """Whether a part is complete; a damaged one is drawn again."""
        if not self.file(part).is_file():
            return False
        try:
            header = npy_header(self.file(part))
        except UserError:
            return False
        return header == ArrayHeader((part[1] - part[0], *self.shape[1:]), self.dtype, fortran=False)

    def missing(self) -> list[Range]:
        """Parts that are not drawn."""
        return [part for part in self.ranges() if not self.is_there(part)]

    def write(self, part: Range, images: np.ndarray) -> None:
        """Keep a part. Raises UserError where the folder went away."""
        if not (self.folder / RECORD).is_file():
            raise UserError(
                f"{self.folder} was removed while its images were being drawn: the same command starts anew"
            )
        with atomic_write(self.file(part)) as beside, open(beside, "wb") as file:
            np.save(file, np.ascontiguousarray(images))

    def wait_for(self, patience_s: float) -> None:
        """Go on when every part is there. Raises UserError where none has come for `patience_s` seconds."""
        left, deadline = self.missing(), time.monotonic() + patience_s
        while left:
            time.sleep(_LOOK_EVERY_S)
            check_stop()
            still = [part for part in left if not self.is_there(part)]
            if len(still) < len(left):
                deadline = time.monotonic() + patience_s
            elif time.monotonic() > deadline:
                raise UserError(
                    f"{len(left)} parts of {self.folder} are left to other processes, and none has come for {patience_s:.0f} s: "
                    "their own output says why, and the same command continues (compute.timeout_s allows more)"
                )
            left = still

    def source(self) -> ImageSource:
        """The images of all parts, in order, never more than a batch in memory."""

        def read(size: int) -> Iterator[np.ndarray]:
            for part in self.ranges():
                yield from npy_batches(self.file(part), size)

        return ImageSource(self.shape, self.dtype, read)

    def remove(self) -> None:
        """Remove all parts, and the record last; `begin_parts` removes the folder unless it holds files of others."""
        clear_unfinished(self.folder)
        for name in files_in(self.folder):
            if re.fullmatch(_OURS, name):
                (self.folder / name).unlink()
        (self.folder / RECORD).unlink(missing_ok=True)


def part_images(folder: Path, plain: Mapping[str, Any], wanted: int, overwrite: bool) -> int:
    """Images of a part: as an earlier sitting laid them out, else `wanted`. Touches nothing.

    plain: the recipe of the job. Raises UserError where the folder is not ours, or of another job.
    """
    if not os.path.lexists(folder):
        return wanted
    if not _is_free(folder):
        raise UserError(
            f"{folder} is where parts of the images would go, and it was not made by tinyfusion: move it away"
        )
    if file_output(folder / RECORD, "sample", plain, overwrite, read_json):
        return wanted
    told = read_json(folder / RECORD).get("part_images")
    if not isinstance(told, int) or told < 1:
        raise UserError(f"{folder}/{RECORD} is damaged: part_images is {told!r}; --overwrite starts anew")
    return told


def _is_free(folder: Path) -> bool:
    """Whether a folder holds a record, or nothing but the lock of a sampling that has just removed its own."""
    if not folder.is_dir():
        return False
    return (folder / RECORD).is_file() or [entry.name for entry in folder.iterdir()] == [LOCK]


@contextmanager
def begin_parts(parts: Parts, plain: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Create the folder with its record, or a new one with `overwrite`, and hold its lock within the block.

    Raises UserError where another process is drawing into it. A folder that is empty at the end is removed.
    """
    made = missing_folders(parts.folder)
    record = stamp("sample", plain, "running", part_images=parts.part_images)
    lock = _locked(parts.folder, record)
    try:
        part_images(parts.folder, plain, parts.part_images, overwrite)
        if overwrite:
            parts.remove()
        else:
            clear_unfinished(parts.folder)
        if not (parts.folder / RECORD).is_file():
            write_json(parts.folder / RECORD, record)
        yield
    finally:
        lock.release()
        remove_empty([parts.folder, *made])


def clear_parts(parts: Parts, plain: Mapping[str, Any]) -> None:
    """Remove parts whose npz is complete, as a process that was killed leaves them."""
    if (parts.folder / RECORD).is_file():
        with suppress(Locked), begin_parts(parts, plain, overwrite=False):
            parts.remove()


def _locked(folder: Path, record: dict[str, Any]) -> Lock:
    """The lock of the folder, which is made with its record where there is none."""
    while True:
        if not os.path.lexists(folder):
            with atomic_write(folder) as beside:
                beside.mkdir()
                write_json(beside / RECORD, record)
        with suppress(FileNotFoundError):  # removed just now, by whoever was finished with it
            return acquire(folder / LOCK, f"draws the images of {folder.with_suffix('')}")
