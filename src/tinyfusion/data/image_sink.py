"""Write image sets of any size to an npz or a folder of PNGs, with at most a batch in memory (see `data/image_source.py`)."""

from __future__ import annotations

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from tinyfusion.core.files import atomic_write
from tinyfusion.data.image_source import ImageSource

_BATCH = 64


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
