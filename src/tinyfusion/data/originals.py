"""Sets of encoded pictures: folders of classes, parquet files and tars, as they are or decoded in memory.

The order depends on names alone: classes, files and tars are sorted, rows and members keep their order. A label comes from
the folder or from the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.config.recipe import Orientation
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory, check_plain, explained, unreadable
from tinyfusion.data import parquet
from tinyfusion.data.folders import open_picture_folder, printable
from tinyfusion.data.picture import SUFFIXES, Picture, Size, decode
from tinyfusion.data.stream import RowGroup

_LABEL_BYTES = 16  # of a label while labels are concatenated
WEBDATASET = "webdataset:"
_AT_A_TIME = 16  # encoded pictures in memory while a set is decoded
_NAMED, _LOOK_ON_S = 4, 10.0  # broken pictures named after the first one, seconds that more are looked for
_VALUE_BYTES = 5  # of a value of a set in memory: uint8, and float32 for training
_SUGGESTED_SIDE = 6  # a message proposes at most 2 to this power of pixels

Contents = Callable[[int, int], Iterator[tuple[str, Any]]]


class MixedSizes(UserError):
    """Pictures of several sizes where one size is needed. problem: which ones; side: a value of `data.size` that would do."""

    def __init__(self, problem: str, side: int) -> None:
        super().__init__(f"{problem}: give one size for all, such as --set data.size={side}")
        self.problem = problem


@dataclass(frozen=True)
class Originals:
    """Encoded pictures in order.

    labels: (N,) int64. contents(first, num): place (for messages) and bytes of each picture. classes: names by label, if any.
    fingerprint: SHA-256 over order, names and labels but not bytes, so that a damaged picture can be repaired while a set is
    being encoded. remarks: lines to print.
    """

    name: str
    labels: np.ndarray
    contents: Contents
    fingerprint: str
    classes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def open_originals(name: str) -> Originals:
    """Open a folder of pictures, or a set by its prefix: parquet, hub, webdataset. Raises UserError without pictures or labels.

    `hub:` and `hub-stream:` yield the same images; the latter caches no files.
    """
    if name.startswith(parquet.WHOLE + parquet.STREAMED):
        return _parquet(name)
    if name.startswith(WEBDATASET):
        return _tars(name, Path(name.removeprefix(WEBDATASET)))
    path = Path(name)
    check_plain(path)
    if path.is_file():
        kind = WEBDATASET if path.suffix == ".tar" else parquet.PARQUET
        raise UserError(f"{name} is a file: wanted a folder of pictures; for a tar or parquet file say {kind}{name}")
    if not path.is_dir():
        others = f"{parquet.PARQUET}PATH, {parquet.HUB}ORG/NAME, {WEBDATASET}PATH or features:PATH"
        raise UserError(f"no pictures at {name}: wanted a folder of pictures or of class folders, {others}")
    return _folder(name, path)


@dataclass(frozen=True)
class Pictures:
    """A decoded set: pixels (N, H, W, C) uint8, labels (N,) int64, and remarks (lines to print)."""

    pixels: np.ndarray
    labels: np.ndarray
    remarks: tuple[str, ...]


def read_originals(name: str, size: int | None = None, orientation: Orientation = "follow") -> Pictures:
    """Decode all pictures of a set (see `decode`); C is 1 where all are grey, else 3.

    Raises UserError where pictures are missing, damaged, of several sizes, or do not fit into memory.
    """
    originals = open_originals(name)
    pixels, changes = stacked(decoded(originals, size, orientation), len(originals), name)
    return Pictures(pixels, originals.labels, (*originals.remarks, *changed(name, len(originals), changes)))


def decoded(
    originals: Originals,
    size: Size | None,
    orientation: Orientation,
    first: int = 0,
    num: int | None = None,
    reader: Callable[[Any, str, Size | None, Orientation], Picture] = decode,
) -> Iterator[tuple[str, Picture]]:
    """(where, picture) of `num` pictures in their order, all by default; several are decoded at a time.

    reader: as `decode`, which is the default.

    Raises UserError on a broken picture; it names up to 5 and counts those of the rest of the set, as far as it is read within
    10 seconds.
    """
    end = len(originals) if num is None else first + num

    def attempt(item: tuple[str, Any]) -> tuple[str, Picture | UserError]:
        where, content = item
        try:
            return where, reader(content, where, size, orientation)
        except UserError as error:
            return where, error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decoding") as threads:

        def outcomes(begin: int, end: int) -> Iterator[tuple[str, Picture | UserError]]:
            for place in range(begin, end, _AT_A_TIME):
                yield from threads.map(attempt, list(originals.contents(place, min(_AT_A_TIME, end - place))))

        for index, (where, picture) in enumerate(outcomes(first, end), first):
            if isinstance(picture, UserError):
                raise _broken(picture, index - first, outcomes(index + 1, len(originals))) from picture
            yield where, picture


def _broken(error: UserError, read: int, rest: Iterator[tuple[str, Picture | UserError]]) -> UserError:
    """The error of the first broken picture, after `read` valid ones, with names and number of those in `rest`."""
    names: list[str] = []
    more, read = 0, read + 1
    deadline = time.monotonic() + _LOOK_ON_S
    with contextlib.suppress(UserError):  # a file that cannot be read is reported in its turn
        for where, outcome in rest:
            read += 1
            if isinstance(outcome, UserError):
                more += 1
                names += [os.path.basename(where)] * (len(names) < _NAMED)
            if time.monotonic() > deadline:
                break
    if not more:
        return error
    of_all = f"{more + 1:,} of the {read:,} pictures read cannot be used, among them {', '.join(names)}"
    return UserError(f"{error} ({of_all})")


def stacked(pictures: Iterable[tuple[str, Picture]], num: int, source: Path | str) -> tuple[np.ndarray, Counter[str]]:
    """Stack `num` decoded pictures to (num, H, W, C) uint8, in colour where any is. Returns them and the counts of changes.

    Raises MixedSizes on several sizes, and UserError where pixels and their training values do not fit into memory.
    """
    pixels, changes = np.empty((0, 0, 0, 1), np.uint8), Counter[str]()
    for i, (where, picture) in enumerate(pictures):
        changes.update(picture.changes)
        height, width, channels = picture.pixels.shape
        size, what = f"{width} x {height}", f"{source}: {num:,} pictures of {width} x {height}"
        if i == 0:
            check_memory(num * height * width * channels * _VALUE_BYTES, what)
            pixels = np.empty((num, height, width, channels), np.uint8)
        if (height, width) != pixels.shape[1:3]:
            side = 2 ** min(int(math.log2(min(pixels.shape[1:3]))), _SUGGESTED_SIDE)
            first = f"the first picture of {source} {pixels.shape[2]} x {pixels.shape[1]}"
            raise MixedSizes(f"{where} is {size}, and {first}", side)
        if channels > pixels.shape[-1]:
            check_memory(pixels.size * channels * _VALUE_BYTES, what)
            pixels = pixels.repeat(channels, -1)
        pixels[i] = picture.pixels
    return pixels, changes


def changed(name: str, num: int, changes: Counter[str]) -> Iterator[str]:
    """A line for each kind of change to pictures of a set of `num`."""
    for change, count in sorted(changes.items()):
        yield f"{printable(name)}: pictures {change}: {count:,} of {num:,}"


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Bytes of a file, `size` of them from `offset` on; all by default. Raises UserError where it cannot be read."""
    check_plain(path)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error


def fingerprint_of(names: Iterable[str], labels: np.ndarray) -> str:
    """SHA-256 over labels and names."""
    digest = hashlib.sha256(np.ascontiguousarray(labels, "<i8").tobytes())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def pictures_in(groups: Sequence[RowGroup]) -> Contents:
    """(first, number) -> place and content of pictures, which are the first column; one row group at a time is in memory."""
    begins = np.cumsum([0, *(group.num for group in groups)])
    cached: dict[int, Any] = {}

    def contents(first: int, num: int) -> Iterator[tuple[str, Any]]:
        for position in range(first, min(first + num, int(begins[-1]))):
            place = int(np.searchsorted(begins, position, side="right")) - 1
            if place not in cached:
                cached.clear()
                cached[place] = groups[place].read()
            row = position - int(begins[place])
            yield f"{groups[place].file}, row {groups[place].first + row}", cached[place].column(0)[row].as_py()

    return contents


def _folder(name: str, path: Path) -> Originals:
    folder = open_picture_folder(path)

    def contents(first: int, num: int) -> Iterator[tuple[str, bytes]]:
        for file in folder.files[first : first + num]:
            yield file, read_file(Path(file))

    labels = np.array(folder.labels, np.int64)
    print_of = fingerprint_of((os.path.relpath(file, folder.root) for file in folder.files), labels)
    return Originals(name, labels, contents, print_of, folder.classes, folder.remarks)


def _parquet(name: str) -> Originals:
    groups: list[RowGroup] = []
    labels: list[np.ndarray] = []
    for file in parquet.tables_of(name):
        with parquet.opened(file) as table:
            _image, label_column = parquet.columns_of(table, file)
            first, rows = 0, table.metadata.num_rows
            check_memory(_LABEL_BYTES * rows, f"{file}: {rows:,} labels")
            for index in range(table.num_row_groups):
                labels += parquet.labels_of(table, index, label_column, str(file), first)
                num = table.metadata.row_group(index).num_rows
                groups.append(RowGroup(file, index, first, num, rows))
                first += num
    known = np.concatenate([np.empty(0, np.int64), *labels])
    if not len(known):
        raise UserError(f"{name} holds no images")
    names = (f"{group.file.name} {group.index} {group.num}" for group in groups)
    return Originals(name, known, pictures_in(groups), fingerprint_of(names, known))


@dataclass(frozen=True)
class TarMember:
    """A picture inside a tar: offset and number of its bytes."""

    tar: Path
    key: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar.name}/{self.key}"


def _tars(name: str, path: Path) -> Originals:
    labelled = [member for tar in tars_at(path) for member in _members(tar)]
    if not labelled:
        raise UserError(f"{path} holds no pictures: wanted NAME.jpg with NAME.cls")
    members, known = [member for member, _ in labelled], np.array([label for _, label in labelled], np.int64)
    return Originals(name, known, tar_contents(members), fingerprint_of(map(str, members), known))


def tar_contents(members: Sequence[TarMember]) -> Contents:
    """Contents of pictures in tars, in order."""

    def contents(first: int, num: int) -> Iterator[tuple[str, bytes]]:
        for member in members[first : first + num]:
            where, content = f"{member.tar}, {member.key}", read_file(member.tar, member.offset, member.size)
            if len(content) != member.size:
                raise UserError(f"{where} was truncated since it was opened")
            yield where, content

    return contents


def _members(tar: Path) -> Iterator[tuple[TarMember, int]]:
    """Pictures and labels of one tar, in its order; the files of a picture have the same stem."""
    pictures: dict[str, TarMember] = {}
    labels: dict[str, int] = {}
    with opened_tar(tar) as archive:
        for key, suffix, info in tar_files(tar, archive, "label"):
            if suffix in SUFFIXES:
                pictures[key] = TarMember(tar, key, info.offset_data, info.size)
            elif suffix == ".cls":
                text = archive.extractfile(info).read(32).strip()  # type: ignore[union-attr]
                value = int(text) if text.isdigit() else text.decode("utf-8", "replace")
                labels[key] = parquet.checked_label(value, f"{tar}, {key}.cls")
    for key, member in pictures.items():
        if key not in labels:
            raise UserError(f"{tar}, {key} has no label: wanted {key}.cls, a whole number from 0")
        yield member, labels[key]


def tars_at(path: Path) -> list[Path]:
    """The tar, or all of a folder, by name. Raises UserError where there is none."""
    check_plain(path)
    tars = sorted(file for file in path.glob("*.tar") if file.is_file()) if path.is_dir() else [path]
    if not tars or not tars[0].is_file():
        raise UserError(f"no tars at {path}: wanted a .tar file, or a folder of them")
    return tars


@contextlib.contextmanager
def opened_tar(tar: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar. Raises UserError, also within the block, where it is damaged."""
    damage = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)
    problem = f"{tar} cannot be read as a tar (unpack a compressed one first)"
    with explained(problem, *damage), tarfile.open(tar, "r:") as archive:
        yield archive


def tar_files(tar: Path, archive: tarfile.TarFile, has: str) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Stem, suffix and entry of the files of a tar but hidden ones. has: what a picture has one of, a label or a caption.

    Raises UserError on two pictures of one stem, and on sparse ones.
    """
    pictures = set[str]()
    for info in _tar_entries(tar, archive):
        folder, _, base = info.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key, suffix = f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"
        if not info.isfile() or base.startswith("."):
            continue
        if suffix in SUFFIXES:
            if key in pictures:
                raise UserError(f"{tar}, {key}: two pictures of one name, and one {has}")
            if info.issparse():
                raise UserError(f"{tar}, {key} is stored as a sparse file: make the tar without --sparse")
            pictures.add(key)
        yield key, suffix, info


def _tar_entries(tar: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar. Raises UserError where an entry is larger than the file, and where the list is truncated."""
    total = tar.stat().st_size
    for info in archive:
        if not 0 <= info.size <= total or (info.isreg() and info.offset_data + info.size > total):
            claim = f"{info.name} has {info.size} bytes from byte {info.offset_data} on, and the file {total}"
            raise UserError(f"{tar} is damaged: {claim}")
        yield info
    with open(tar, "rb") as file:  # tarfile takes a damaged header for the end of the list
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise UserError(f"{tar} is damaged: at byte {archive.offset} there is no header")
