"""Sets of images of any size: in memory where they are small, else read from their file a batch at a time.

50,000 pictures of 256 x 256 are 9.8 GB; nothing here ever holds more than a batch of them.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Orientation
from tinyfusion.data.images import read_images_npz
from tinyfusion.data.originals import Originals, decoded
from tinyfusion.data.picture import Picture

IN_MEMORY_BYTES = 2**29  # sets up to here are read once
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # names of stored moments in references of the ADM form


@dataclass(frozen=True)
class ImageSource:
    """shape (N, H, W, C). read(B): batches of B images in order. array: all of them, where they are in memory."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype[np.generic]
    read: Callable[[int], Iterator[np.ndarray]]
    array: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def first(self) -> np.ndarray:
        """The first image, (1, H, W, C)."""
        return next(self.read(1))

    def hash(self) -> str:
        """SHA-256 over type, shape and pixels."""
        digest = hashlib.sha256(f"{self.dtype}\0{self.shape}\0".encode())
        for batch in self.read(64):
            digest.update(np.ascontiguousarray(batch).data)
        return digest.hexdigest()


def source_of(images: np.ndarray) -> ImageSource:
    """Images (N, H, W, C) in memory."""

    def read(size: int) -> Iterator[np.ndarray]:
        for first in range(0, len(images), size):
            yield images[first : first + size]

    num, height, width, channels = images.shape
    return ImageSource((num, height, width, channels), images.dtype, read, images)


def open_npz(path: Path) -> ImageSource:
    """arr_0 of an npz. Raises UserError as `read_images_npz` does, of a large file when its batches are read."""
    header = _header(path)
    if header is None:
        return source_of(read_images_npz(path)[0])
    shape, dtype = header

    def read(size: int) -> Iterator[np.ndarray]:
        one = math.prod(shape[1:]) * dtype.itemsize
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                _read_header(file)
                for first in range(0, shape[0], size):
                    num = min(size, shape[0] - first)
                    content = file.read(num * one)
                    if len(content) != num * one:
                        raise UserError(f"{path} was cut short: arr_0 ends in image {first + len(content) // one}")
                    yield np.frombuffer(bytearray(content), dtype).reshape(num, *shape[1:])
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} cannot be read as an npz of plain arrays: {error}") from error

    return ImageSource(shape, dtype, read)


def _header(path: Path) -> tuple[tuple[int, int, int, int], np.dtype[np.generic]] | None:
    """Shape and type of arr_0 where it is too large for the memory, and plain; None where it is to be read whole."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _read_header(file)
    except (KeyError, OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None  # reading it whole says what is wrong
    small = math.prod(shape) * dtype.itemsize <= IN_MEMORY_BYTES
    if small or fortran or dtype != np.uint8 or len(shape) != 4 or 0 in shape:
        return None
    return (shape[0], shape[1], shape[2], shape[3]), dtype


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(file)


def streamed_pictures(originals: Originals, size: int | None, orientation: Orientation) -> ImageSource:
    """Pictures that are decoded when their batch is read; grey ones are in colour where the first one is.

    size, orientation: as in `decode`. Raises UserError on the first picture, and while reading on all others.
    """
    _where, first = next(decoded(originals, size, orientation, 0, 1))
    height, width, channels = first.pixels.shape

    def fitting(where: str, picture: Picture) -> np.ndarray:
        pixels = picture.in_colour if channels == 3 else picture.pixels
        if pixels.shape != first.pixels.shape:
            raise UserError(
                f"{where} is {pixels.shape}, and the first picture of {originals.name} {first.pixels.shape} (height, width, "
                "channels): give one size for all, such as --set data.size=64, and grey pictures or coloured ones"
            )
        return pixels

    def read(num: int) -> Iterator[np.ndarray]:
        for begin in range(0, len(originals), num):
            batch = decoded(originals, size, orientation, begin, min(num, len(originals) - begin))
            yield np.stack([fitting(where, picture) for where, picture in batch])

    return ImageSource((len(originals), height, width, channels), first.pixels.dtype, read)


def read_labels(path: Path) -> np.ndarray | None:
    """arr_1 of an npz, without its images; None where there is none or it is no npz."""
    arrays = _named_arrays(path, ("arr_1",))
    return arrays.get("arr_1")


def read_moments(path: Path) -> dict[str, np.ndarray]:
    """Stored moments of an npz in the ADM form, float64, by name; empty where there are none.

    Raises UserError where they do not fit together or are not finite.
    """
    arrays = _named_arrays(path, MOMENTS)
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in arrays) != (covariance in arrays):
            have, lack = (mean, covariance) if mean in arrays else (covariance, mean)
            raise UserError(f"{path} has {have} without {lack}: stored moments are a mean and a covariance")
        if mean in arrays:
            size = arrays[mean].size
            if arrays[mean].shape != (size,) or arrays[covariance].shape != (size, size):
                raise UserError(
                    f"{path}: {mean} {arrays[mean].shape} and {covariance} {arrays[covariance].shape} do not fit together: "
                    "wanted (D,) and (D, D)"
                )
    for name, values in arrays.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path}: {name} is {values.dtype} or not finite; wanted finite floats")
    return {name: values.astype(np.float64) for name, values in arrays.items()}


def has_images(path: Path) -> bool:
    """Whether an npz holds arr_0."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return True  # reading it says what is wrong


def _named_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an npz of plain arrays: {error}") from error
