"""Read and write images and labels as npz, and write grids as PNG. Nothing is unpickled.

Shapes: N images, H x W pixels, C channels, channels last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory
from tinyfusion.core.rundir import atomic_write
from tinyfusion.data.npz import ArrayHeader, Npz, opened_npz

MAX_LABEL = 2**31 - 1  # a larger label is taken for damage
_GAP_PX = 1  # between the images of a grid, before upscaling


def read_images_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, H, W, C), uint8 or float32, and labels (N,) int64 where the file has them.

    Raises UserError on a missing or foreign file, no images, a wrong type or shape, NaN, or labels that do not fit.
    """
    with opened_npz(path) as archive:
        if "arr_0" not in archive.names:
            names = ", ".join(archive.names) or "nothing"
            raise UserError(f"{path} holds {names}: wanted images in arr_0, (N, H, W, C) uint8")
        check_images_header(archive.header("arr_0"), path)
        labels = _read_labels(archive) if "arr_1" in archive.names else None  # before the images, which are large
        images = archive.read("arr_0")
    if images.dtype != np.uint8:
        check_memory(4 * images.size, f"{path}: arr_0 as float32")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused
            images = images.astype(np.float32)
        if bad := int((~np.isfinite(images)).sum()):
            raise UserError(f"{path}: arr_0 has {bad} values that are not finite (NaN or infinity)")
    return images, labels


def middle_frames(videos: np.ndarray) -> np.ndarray:
    """(N, H, W, 3): the middle frame of every video; images (N, H, W, C) as they are."""
    return videos[:, videos.shape[1] // 2] if videos.ndim == 5 else videos


def read_shown_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """As `read_images_npz`; of videos (N, F, H, W, 3) uint8 the middle frames."""
    with opened_npz(path) as archive:
        header = archive.header("arr_0") if "arr_0" in archive.names else None
        if header is not None and len(header.shape) == 5 and 0 not in header.shape:
            if header.dtype != np.uint8 or header.shape[-1] != 3:
                raise UserError(f"{path}: videos are uint8 (N, F, H, W, 3); arr_0 is {header}")
            labels = _read_labels(archive) if "arr_1" in archive.names else None
            return np.concatenate([middle_frames(each) for each in archive.batches("arr_0", 1)]), labels
    return read_images_npz(path)


def check_images_header(header: ArrayHeader, path: Path) -> None:
    """Raise UserError unless arr_0 of an npz can be images, by its type and shape."""
    if header.dtype != np.uint8 and header.dtype.kind != "f":
        raise UserError(f"{path}: images are uint8 (0 to 255) or floats in [-1, 1]; arr_0 is {header.dtype}")
    if len(header.shape) != 4 or 0 in header.shape:
        raise UserError(f"{path}: images are (N, H, W, C) with at least one image; arr_0 is {header.shape}")


def _read_labels(archive: Npz) -> np.ndarray:
    """arr_1 as int64, checked against the header of arr_0 before it is read."""
    num_images, header = archive.header("arr_0").shape[0], archive.header("arr_1")
    if header.dtype.kind not in "iu" or header.shape != (num_images,):
        wanted = f"labels in arr_1 are ({num_images},) integers"
        raise UserError(f"{archive.path}: {wanted}; got {header.shape} {header.dtype}")
    labels = archive.read("arr_1")
    if labels.min() < 0:
        raise UserError(f"{archive.path}: labels are 0 or more; the smallest is {labels.min()}")
    if labels.max() > MAX_LABEL:
        raise UserError(f"{archive.path}: labels are at most {MAX_LABEL:,}; the largest is {labels.max()}")
    return labels.astype(np.int64)


def write_grid_png(path: Path, images: np.ndarray, columns: int, scale: int = 1) -> None:
    """Write images (N, H, W, C) uint8, C 1 or 3, as one picture, `columns` in a row, pixels `scale` wide and high."""
    grid = image_grid(images, columns).repeat(scale, axis=0).repeat(scale, axis=1)
    with atomic_write(path) as temporary:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(temporary, format="PNG")


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """(rows (H + 1) - 1, columns (W + 1) - 1, C) uint8: images (N, H, W, C) in rows, one white pixel between them."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"a grid takes uint8 images (N, H, W, 1 or 3); got {images.dtype} {images.shape}")
    num, height, width, channels = images.shape
    columns = max(min(columns, num), 1)
    rows = -(-num // columns)
    grid = np.full((rows * (height + _GAP_PX), columns * (width + _GAP_PX), channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + _GAP_PX), (i % columns) * (width + _GAP_PX)
        grid[top : top + height, left : left + width] = image
    return grid[:-_GAP_PX, :-_GAP_PX]
