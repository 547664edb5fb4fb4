"""Pictures as they come, before any autoencoder: folders of classes, parquet files, tars; and the published centre crop.

The order is a function of names alone: classes, files and tars sorted, rows and members in their order. A label is the
place of its folder among the sorted ones, or what the file says.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyfusion.core.errors import UserError
from tinyfusion.data.parquet import (
    HUB,
    PARQUET,
    STREAMED,
    WHOLE,
    checked_label,
    columns_of,
    decoded,
    opened,
    stacked,
    tables_of,
)
from tinyfusion.data.stream import RowGroup

WEBDATASET = "webdataset:"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
_OPAQUE, _ALPHA = ("1", "L", "P", "RGB", "CMYK", "YCbCr"), ("RGBA", "LA", "PA", "La", "RGBa")
_MOST_PIXELS = 2**27  # of a picture made larger: one of 1 x 5,000 pixels is a mistake

Contents = Callable[[int, int], Iterator[tuple[str, Any]]]


@dataclass(frozen=True)
class Originals:
    """Encoded pictures in their order.

    labels: (N,) int64. contents(first, num): where each of these pictures is, for people, and its bytes. classes: names in
    the order of labels, where there are names. fingerprint: SHA-256 over order, names and labels; bytes are not looked at,
    so a damaged picture may be put right while a set is being encoded.
    """

    name: str
    labels: np.ndarray
    contents: Contents
    fingerprint: str
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def open_originals(name: str) -> Originals:
    """A folder of classes, or a set by its prefix: parquet, hub, webdataset. Raises UserError where there are no pictures or labels.

    A whole set and a stream of it are the same here, but that `hub-stream:` keeps no files.
    """
    if name.startswith(WHOLE + STREAMED):
        return _parquet(name)
    if name.startswith(WEBDATASET):
        return _tars(name, Path(name.removeprefix(WEBDATASET)))
    path = Path(name)
    if path.is_file():
        kind = WEBDATASET if path.suffix == ".tar" else PARQUET
        raise UserError(f"{name} is a file: wanted a folder of classes; for a tar or parquet file say {kind}{name}")
    if not path.is_dir():
        raise UserError(
            f"no pictures at {name}: wanted a folder with a folder per class, {PARQUET}PATH, {HUB}ORG/NAME, {WEBDATASET}PATH or "
            "features:PATH"
        )
    return _folder(name, path)


def read_originals(name: str, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) uint8 and labels (N,) int64, all in memory; size and errors as of `read_parquet_images`."""
    found = open_originals(name)
    images = [decoded(content, where, size) for where, content in found.contents(0, len(found))]
    return stacked(images, name), found.labels


def _fingerprint(names: Iterator[str], labels: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(labels, "<i8").tobytes())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(name: str, path: Path) -> Originals:
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = list(_pictures_in(path / folder))
        if not found:
            raise UserError(f"{path / folder} holds no pictures ({', '.join(_SUFFIXES)}): every folder is a class")
        files += found
        labels += [label] * len(found)
    if not files:
        loose = next(_pictures_in(path), None)
        why = f"pictures such as {Path(loose).name} lie in it without a class" if loose else "it has no folders"
        raise UserError(f"{path} is no folder of classes: {why}; wanted a folder per class, with its pictures inside")

    def contents(first: int, num: int) -> Iterator[tuple[str, bytes]]:
        for file in files[first : first + num]:
            try:
                yield file, Path(file).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from error

    known = np.array(labels, np.int64)
    print_of = _fingerprint((os.path.relpath(file, path) for file in files), known)
    return Originals(name, known, contents, print_of, tuple(classes))


def _pictures_in(folder: Path) -> Iterator[str]:
    """Files with a picture's suffix, also in folders below: those folders sorted, then the names in each."""
    for root, _folders, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield os.path.join(root, name)


# ------------------------------------------------------------------------------------------------------------- parquet


def _parquet(name: str) -> Originals:
    groups: list[RowGroup] = []
    labels: list[int] = []
    for file in tables_of(name):
        with opened(file) as table:
            _image, label_column = columns_of(table, file)
            first, rows = 0, table.metadata.num_rows
            for index in range(table.num_row_groups):
                values = table.read_row_group(index, columns=[label_column]).column(0).to_pylist()
                labels += [checked_label(value, f"{file}, row {first + row}") for row, value in enumerate(values)]
                groups.append(RowGroup(file, index, first, len(values), rows))
                first += len(values)
    if not labels:
        raise UserError(f"{name} holds no images")
    begins = np.cumsum([0, *(group.num for group in groups)])
    held: dict[int, Any] = {}

    def contents(first: int, num: int) -> Iterator[tuple[str, Any]]:
        for position in range(first, min(first + num, len(labels))):
            place = int(np.searchsorted(begins, position, side="right")) - 1
            if place not in held:
                held.clear()
                held[place] = groups[place].read()
            row = position - int(begins[place])
            encoded = held[place].column(0)[row].as_py()
            content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
            yield f"{groups[place].file}, row {groups[place].first + row}", content

    known = np.array(labels, np.int64)
    names = (f"{group.file.name} {group.index} {group.num}" for group in groups)
    return Originals(name, known, contents, _fingerprint(names, known))


# ---------------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class _Member:
    """A picture inside a tar: where its bytes begin, and how many they are."""

    tar: Path
    key: str
    offset: int
    size: int


def _tars(name: str, path: Path) -> Originals:
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not tars or not tars[0].is_file():
        raise UserError(f"no tars at {path}: wanted a .tar file, or a folder of them")
    members: list[_Member] = []
    labels: list[int] = []
    for tar in tars:
        for member, label in _members(tar):
            members.append(member)
            labels.append(label)
    if not members:
        raise UserError(f"{path} holds no pictures: wanted NAME.jpg with NAME.cls beside it")

    def contents(first: int, num: int) -> Iterator[tuple[str, bytes]]:
        for member in members[first : first + num]:
            where = f"{member.tar}, {member.key}"
            try:
                with open(member.tar, "rb") as file:
                    file.seek(member.offset)
                    content = file.read(member.size)
            except OSError as error:
                raise UserError(f"cannot read {where}: {error.strerror}") from error
            if len(content) != member.size:
                raise UserError(f"{where} was cut short since it was opened")
            yield where, content

    known = np.array(labels, np.int64)
    names = (f"{member.tar.name}/{member.key}" for member in members)
    return Originals(name, known, contents, _fingerprint(names, known))


def _members(tar: Path) -> Iterator[tuple[_Member, int]]:
    """Pictures and labels of one tar, in its order: the files of one key stand side by side."""
    pictures: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for info in opened:
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"
                if not info.isfile() or base.startswith("."):
                    continue
                if suffix in _SUFFIXES:
                    if key in pictures:
                        raise UserError(f"{tar}, {key}: two pictures of one name, and one label")
                    pictures[key] = _Member(tar, key, info.offset_data, info.size)
                elif suffix == ".cls":
                    text = opened.extractfile(info).read(32).strip()  # type: ignore[union-attr]
                    labels[key] = checked_label(
                        int(text) if text.isdigit() else text.decode("utf-8", "replace"), f"{tar}, {key}.cls"
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{tar} cannot be read as a tar: {error} (a compressed one is to be unpacked first)") from error
    for key, member in pictures.items():
        if key not in labels:
            raise UserError(f"{tar}, {key} has no label: wanted {key}.cls beside it, a whole number from 0")
        yield member, labels[key]


# ---------------------------------------------------------------------------------------------------------------- crop


def cropped(content: Any, where: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8: an encoded picture in colour, through `centre_crop`. where: names it to people.

    Grey, palette and CMYK pictures become RGB; an alpha channel may be there if all of it is opaque. Orientation tags are
    not followed, as published. Raises UserError on damaged pictures, transparent ones and those of more than 8 bits.
    """
    if not isinstance(content, bytes):
        raise UserError(f"{where}: wanted an encoded picture (bytes); got {type(content).__name__}")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            picture = _opaque(image, where)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where} cannot be decoded as a picture ({', '.join(_FORMATS)}): damaged or cut short"
        ) from error
    width, height = picture.size
    if max(width, height) * size * size > _MOST_PIXELS * min(width, height):
        raise UserError(f"{where} is {width} x {height}: too narrow for a crop of {size} x {size}")
    return np.asarray(centre_crop(picture, size))


def _opaque(image: Image.Image, where: str) -> Image.Image:
    """The picture in RGB."""
    if image.mode not in (*_OPAQUE, *_ALPHA):
        raise UserError(f"{where} is a picture of mode {image.mode}: wanted 8 bits, grey or colour")
    if image.mode in _ALPHA or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A").getextrema()
        if alpha != (255, 255):
            raise UserError(f"{where} is transparent in parts: put it on a background first")
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, size x size, as ADM and DiT were trained on.

    It is halved by a box filter while its shorter side is at least twice `size`, brought to that side by a bicubic one
    (pictures that are too small become larger), and cut; what cannot be cut evenly is cut less at the top and left.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))
