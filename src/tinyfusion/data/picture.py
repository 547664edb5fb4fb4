"""Decode a picture: check its header, convert to 8 bits of grey or colour, turn and crop. Every source of pictures uses it."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from tinyfusion.config.recipe import Orientation
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory, check_plain

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MOST_PIXELS = 2**27  # of one picture: sensors of 102 million are among the largest
SMALL_FILE_BYTES = 2**27  # limit of a decoded picture of any file; above it the file must have a 64th of that size
_CHECKED_PIXELS = 2**24  # above this a picture is compared with the available memory
_ALONE_PIXELS = 2**25  # above this pictures are decoded one at a time
_DECODED_BYTES = {"L": 1, "1": 2, "LA": 5, "P": 5}  # per pixel in memory, with its 8-bit form; 4 of other modes
_TURNED = 2  # times these bytes, where a picture is turned
_GREY, _GREY_ALPHA, _COLOUR, _ALPHA = ("1", "L"), ("LA", "La"), ("P", "RGB", "CMYK", "YCbCr"), ("RGBA", "PA", "RGBa")
_SIXTEEN_BITS = {"PNG": ("I;16", "I"), "PPM": ("I",)}  # formats whose values span 0 to 65,535 by definition
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation  # fmt: skip
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_alone = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """A decoded picture. pixels: (H, W, 1) uint8 if grey, else (H, W, 3). changes: what decoding changed, for messages."""

    pixels: np.ndarray
    changes: tuple[str, ...] = ()

    @property
    def in_colour(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.pixels if self.pixels.shape[-1] == 3 else self.pixels.repeat(3, -1)


Size = int | tuple[int, int]  # side of a square, or (height, width)


def decode(encoded: Any, where: str, size: Size | None = None, orientation: Orientation = "follow") -> Picture:
    """Decode a picture from bytes, or from a struct with `bytes` as in parquet files. where: its place, for messages.

    size: of the `centre_crop`; None: no crop. orientation: whether EXIF tags are followed. Of 16 bits, where the format
    defines white, the upper eight are used. Raises UserError on damaged or transparent pictures, and on those too large or too
    narrow.
    """
    content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
    if not isinstance(content, bytes):
        raise UserError(f"{where}: wanted an encoded picture (bytes); got {type(content).__name__}")
    with _reading(where):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    with _room_for(image, len(content), where), image:  # closed before there is room for the next one
        return _decoded(image, where, size, orientation)


def _decoded(image: Image.Image, where: str, size: Size | None, orientation: Orientation) -> Picture:
    """The pixels of an opened picture, turned and cropped."""
    with _reading(where):
        turn = _TURNS.get(_orientation_of(image)) if orientation == "follow" else None
        picture, changes = _eight_bits(image, where)
        if turn is not None:
            picture = picture.transpose(turn)
            changes.append("turned as their orientation tags say")
    if size is not None and picture.size != (wanted := _width_height(size)):
        width, height = picture.size
        change = "enlarged" if width < wanted[0] or height < wanted[1] else "cropped"
        changes.append(f"{change} to {wanted[0]} x {wanted[1]}")
        scale = max(wanted[0] / width, wanted[1] / height)
        if width * scale * height * scale > MOST_PIXELS:  # its resized form would be huge
            raise UserError(f"{where} is {width} x {height}: too narrow for a crop of {wanted[0]} x {wanted[1]}")
        picture = centre_crop(picture, size)
    pixels = np.array(picture)
    return Picture(pixels[..., None] if pixels.ndim == 2 else pixels, tuple(changes))


def size_of(encoded: Any, where: str, orientation: Orientation = "follow") -> tuple[int, int]:
    """(height, width) of a picture by its header, turned as `decode` turns it. Raises UserError where there is no header.

    encoded: as of `decode`, or the path of a file, of which only the header is read.
    """
    content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
    if not isinstance(content, bytes | Path):
        raise UserError(f"{where}: wanted an encoded picture (bytes); got {type(content).__name__}")
    if isinstance(content, Path):
        check_plain(content)
    source = content if isinstance(content, Path) else io.BytesIO(content)
    with _reading(where), Image.open(source, formats=FORMATS) as image:
        turned = orientation == "follow" and _orientation_of(image) in _ON_ITS_SIDE
        return (image.width, image.height) if turned else (image.height, image.width)


def _width_height(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[1], size[0])


def decode_frames(content: bytes, where: str, size: Size, frames: int) -> Picture:
    """The first frames of an animation (GIF, WebP), each as of `decode`: pixels (F, H, W, 3).

    Raises UserError where there are fewer, and on damaged animations.
    """
    with _reading(where):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    pixels: list[np.ndarray] = []
    with _room_for(image, len(content) * frames, where), image:
        with _reading(where):
            there = getattr(image, "n_frames", 1)
        check_frames(there, frames, where)
        for index in range(frames):
            with _reading(where):
                image.seek(index)
                frame = image.convert("RGBA").convert("RGB")
            pixels.append(np.array(frame if frame.size == _width_height(size) else centre_crop(frame, size)))
    return Picture(np.stack(pixels))


def check_frames(there: int, frames: int, where: str) -> None:
    """Raise UserError where a clip has fewer than `frames` frames."""
    if there < frames:
        raise UserError(f"{where} has {there:,} frames: wanted at least {frames:,}, or a smaller encode.frames")


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn errors of Pillow into UserError: its plugins raise many kinds of exceptions on damaged files."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} has more than {MOST_PIXELS:,} pixels: make it smaller") from error
    except Exception as error:
        problem = f"{where} cannot be decoded as a picture ({', '.join(FORMATS)}): damaged or truncated"
        raise UserError(f"{problem}; repair it, or move it out of the set") from error


@contextlib.contextmanager
def _room_for(image: Image.Image, num_bytes: int, where: str) -> Iterator[None]:
    """Guard the decoding of a picture whose header was read. Raises UserError where it would take too much memory."""
    pixels, size = image.width * image.height, f"{image.width} x {image.height}"
    decoded_bytes = pixels * _DECODED_BYTES.get(image.mode, 4)
    if pixels > MOST_PIXELS:
        raise UserError(f"{where} is {size}: wanted at most {MOST_PIXELS:,} pixels; make it smaller")
    if decoded_bytes > max(SMALL_FILE_BYTES, 64 * num_bytes):
        file = f"its file has {num_bytes:,} bytes, which no photograph of that size has"
        raise UserError(f"{where} is {size}, and {file}: make it smaller")
    with _alone if pixels > _ALONE_PIXELS else contextlib.nullcontext():
        if pixels > _CHECKED_PIXELS:
            check_memory(_TURNED * decoded_bytes, f"{where}, a picture of {size},")
        yield


def _orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 without one; Pillow has already turned TIFF files."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged tags, on which Pillow raises many kinds of exceptions
        return 1
    return orientation if isinstance(orientation, int) else 1


def _eight_bits(image: Image.Image, where: str) -> tuple[Image.Image, list[str]]:
    """Convert to mode L or RGB. Returns the picture and the changes."""
    mode, transparent = image.mode, "transparency" in image.info
    if mode in _SIXTEEN_BITS.get(image.format or "", ()) and not transparent:
        values = np.asarray(image) >> 8
        return Image.fromarray(values.astype(np.uint8)), ["reduced to 8 bits"]
    if mode not in (*_GREY, *_GREY_ALPHA, *_COLOUR, *_ALPHA):
        raise UserError(f"{where} is a picture of mode {mode}: wanted 8 bits, grey or colour")
    if mode in (*_GREY_ALPHA, *_ALPHA) or transparent:
        if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{where} is partly transparent: put it on a background first")
        if mode not in (*_GREY, *_GREY_ALPHA):
            return image.convert("RGBA").convert("RGB"), []
    image.load()
    wanted = "L" if mode in (*_GREY, *_GREY_ALPHA) else "RGB"
    return (image if image.mode == wanted else image.convert(wanted)), []  # a large picture is not copied needlessly


def centre_crop(picture: Image.Image, size: Size) -> Image.Image:
    """Centre crop of a picture: of a square as in the training of ADM, and of (height, width) likewise.

    The picture is halved with a box filter while it is at least twice as large as `size`, resized with a bicubic filter until it
    just covers it (small pictures are enlarged), and cropped; an odd margin is smaller at the top and left.
    """
    width, height = _width_height(size)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
