"""Read and write image sets of any size: small ones in memory, others with at most a batch in memory."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from tinyfusion.config.recipe import Orientation
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import atomic_write
from tinyfusion.data.images import check_images_header, read_images_npz
from tinyfusion.data.npz import ArrayHeader, is_npz, opened_npz
from tinyfusion.data.originals import MixedSizes, Originals, decoded
from tinyfusion.data.picture import Picture

IN_MEMORY_BYTES = 2**29  # limit of sets that are read once
_BATCH = 64  # images written at a time
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # names of stored moments in references of the ADM form


@dataclass(frozen=True)
class ImageSource:
    """A set of images. shape: (N, H, W, C), of videos (N, F, H, W, 3). read(B): batches of B in order. array: all, if in memory."""

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


def without_colour(images: ImageSource) -> ImageSource:
    """Images as `grey_pixels`; those that are not in memory as they are."""
    pixels = images.array
    grey = None if pixels is None else grey_pixels(pixels)
    return images if grey is None or grey is pixels else source_of(grey)


def grey_pixels(pixels: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) whose three channels are equal as grey ones, (N, H, W, 1); others as they are."""
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or not (pixels == pixels[..., :1]).all():
        return pixels
    return np.ascontiguousarray(pixels[..., :1])


def open_npz(path: Path, videos: bool = False) -> ImageSource:
    """Open arr_0 of an npz. Raises UserError as `read_images_npz` does, for a large file while its batches are read.

    videos: accept uint8 (N, F, H, W, 3) too.
    """
    with opened_npz(path) as archive:
        header = archive.header("arr_0") if "arr_0" in archive.names else None
    if videos and header is not None and len(header.shape) == 5 and 0 not in header.shape and not header.fortran:
        if header.dtype != np.uint8 or header.shape[-1] != 3:
            raise UserError(f"{path}: videos are uint8 (N, F, H, W, 3); arr_0 is {header}")
        return _streamed_npz(path, header)
    if header is None or header.nbytes <= IN_MEMORY_BYTES or header.fortran or header.dtype != np.uint8:
        return source_of(read_images_npz(path)[0])
    check_images_header(header, path)
    return _streamed_npz(path, header)


def is_videos(path: Path) -> bool:
    """Whether arr_0 of an npz has the shape of videos."""
    if not is_npz(path):
        return False
    with opened_npz(path) as archive:
        return "arr_0" in archive.names and len(archive.header("arr_0").shape) == 5


def _streamed_npz(path: Path, header: ArrayHeader) -> ImageSource:
    def read(size: int) -> Iterator[np.ndarray]:
        with opened_npz(path) as archive:
            yield from archive.batches("arr_0", size)

    shape: Any = header.shape
    return ImageSource(shape, header.dtype, read)


def streamed_pictures(originals: Originals, size: int | None, orientation: Orientation) -> ImageSource:
    """Pictures that are decoded when their batch is read; all are in colour if the first one is.

    size, orientation: as in `decode`. Raises UserError on the first picture, and while reading on all others.
    """
    _where, first = next(decoded(originals, size, orientation, 0, 1))
    height, width, channels = first.pixels.shape

    def fitting(where: str, picture: Picture) -> np.ndarray:
        pixels = picture.in_colour if channels == 3 else picture.pixels
        if pixels.shape != first.pixels.shape:
            sizes = f"{where} is {pixels.shape}, and the first picture of {originals.name} {first.pixels.shape}"
            raise MixedSizes(f"{sizes} (height, width, channels; pictures are all grey or all coloured)", 64)
        return pixels

    def read(num: int) -> Iterator[np.ndarray]:
        for begin in range(0, len(originals), num):
            batch = decoded(originals, size, orientation, begin, min(num, len(originals) - begin))
            yield np.stack([fitting(where, picture) for where, picture in batch])

    return ImageSource((len(originals), height, width, channels), first.pixels.dtype, read)


def read_labels(path: Path) -> np.ndarray | None:
    """arr_1 of an npz, without its images; None if it has none or is no npz."""
    if not is_npz(path):
        return None
    with opened_npz(path) as archive:
        return archive.read("arr_1") if "arr_1" in archive.names else None


def read_moments(path: Path) -> dict[str, np.ndarray]:
    """Stored moments of an npz in the ADM form, float64, by name; empty if there are none.

    Raises UserError where they do not fit together or are not finite.
    """
    if not is_npz(path):
        return {}
    with opened_npz(path) as archive:
        shapes = {name: archive.header(name).shape for name in MOMENTS if name in archive.names}
        for mean, covariance in (MOMENTS[:2], MOMENTS[2:]):
            if (mean in shapes) != (covariance in shapes):
                have, lack = (mean, covariance) if mean in shapes else (covariance, mean)
                raise UserError(f"{path} has {have} without {lack}: stored moments are a mean and a covariance")
            size = math.prod(shapes.get(mean, ()))
            if mean in shapes and (shapes[mean], shapes[covariance]) != ((size,), (size, size)):
                given = f"{mean} {shapes[mean]} and {covariance} {shapes[covariance]}"
                raise UserError(f"{path}: {given} do not fit together: wanted (D,) and (D, D)")
        arrays = {name: archive.read(name) for name in shapes}
    for name, values in arrays.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path}: {name} is {values.dtype} or not finite; wanted finite floats")
    return {name: values.astype(np.float64) for name, values in arrays.items()}


def has_images(path: Path) -> bool:
    """Whether an npz has arr_0."""
    with opened_npz(path) as archive:
        return "arr_0" in archive.names


def stream_images_npz(path: Path, images: ImageSource, labels: np.ndarray) -> None:
    """Write images (N, H, W, C) and labels (N,) whole, uncompressed: arr_0, arr_1. The bytes are those of `numpy.savez`."""
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _write_header(file, images.shape, images.dtype)
            for batch in images.read(_BATCH):
                file.write(np.ascontiguousarray(batch).data)
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            _write_header(file, labels.shape, labels.dtype)
            file.write(np.ascontiguousarray(labels).data)


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    described = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": described, "fortran_order": False, "shape": shape})


def write_png_folder(folder: Path, images: ImageSource) -> None:
    """Write images (N, H, W, 1 or 3) uint8 as 000000.png, 000001.png, ..., the whole folder at once."""
    with atomic_write(folder, r"[0-9]{6,}\.png") as temporary, ThreadPoolExecutor(os.cpu_count()) as threads:
        temporary.mkdir()

        def write(index: int, image: np.ndarray) -> None:
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(pixels).save(temporary / f"{index:06d}.png", compress_level=1)

        first = 0
        for batch in images.read(_BATCH):
            list(threads.map(write, range(first, first + len(batch)), batch))
            first += len(batch)


_OURS = r"[0-9]{6,}\.mp4|[0-9]{6,}/[0-9]{4,}\.png"


def write_video_folder(folder: Path, videos: ImageSource, frames_per_second: int) -> None:
    """Write the frames of video i as 00000i/0000.png and so on, and 00000i.mp4 where ffmpeg is on PATH, the whole folder at once.

    An ffmpeg that fails is reported on stderr once, and the frames are written all the same.
    """
    program, failed = shutil.which("ffmpeg"), ""
    with atomic_write(folder, _OURS) as temporary:
        temporary.mkdir()
        for index, video in enumerate(video for batch in videos.read(1) for video in batch):
            frames = temporary / f"{index:06d}"
            frames.mkdir()
            for number, frame in enumerate(video):
                Image.fromarray(frame).save(frames / f"{number:04d}.png", compress_level=1)
            if program and not failed:
                failed = _joined(program, frames, video, frames_per_second)
    if not program:
        print(f"{folder}: frames alone, because ffmpeg, which makes an mp4 of them, is not on PATH", file=sys.stderr)
    elif failed:
        print(f"{folder}: frames alone, because ffmpeg failed: {failed}", file=sys.stderr)


def _joined(program: str, frames: Path, video: np.ndarray, frames_per_second: int) -> str:
    """Write the mp4 next to a folder of frames. Returns what went wrong; empty where nothing did."""
    even = "scale=trunc(iw/2)*2:trunc(ih/2)*2"  # yuv420p has no odd sides
    made = frames.with_suffix(".mp4")
    command = [
        program, "-y", "-loglevel", "error", "-framerate", str(frames_per_second), "-i", str(frames / "%04d.png"),
        "-vf", even, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-frames:v", str(len(video)), str(made),
    ]  # fmt: skip
    try:
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        return str(error.strerror or error)
    if ran.returncode == 0 and made.is_file():
        return ""
    made.unlink(missing_ok=True)
    return " ".join(ran.stderr.split())[-200:] or f"exit code {ran.returncode}"
