"""Read arrays of npz and npy files: headers are checked before any value is read, and nothing is unpickled."""

from __future__ import annotations

import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory, check_plain, explained, unreadable

_PIECE_BYTES = 2**22  # decompressed at a time
_DAMAGE = (  # errors of zipfile, its decompressors and numpy's parser of headers on damaged files
    OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError, SyntaxError,
    MemoryError, NotImplementedError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """The header of an array. fortran: columns come first."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Npz:
    """An open npz. names: its arrays, without ".npy". Use `opened_npz`, which turns errors of damaged files into UserError."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        self.names = tuple(sorted(self._members))

    def header(self, name: str) -> ArrayHeader:
        """The header of an array. Raises where it claims more bytes than its member of the zip has."""
        with self._archive.open(self._members[name]) as file:
            return _read_header(file, self._members[name].file_size, name)

    def read(self, name: str) -> np.ndarray:
        """A whole array. Raises where the memory does not suffice."""
        with self._archive.open(self._members[name]) as file:
            return _read_array(file, self._members[name].file_size, name, self.path)

    def batches(self, name: str, size: int) -> Iterator[np.ndarray]:
        """`size` rows of an array in C order at a time."""
        with self._archive.open(self._members[name]) as file:
            yield from _read_batches(file, self._members[name].file_size, name, size)


@contextmanager
def opened_npz(path: Path) -> Iterator[Npz]:
    """Open an npz. Raises UserError if it is missing, and within the block if it is damaged."""
    check_plain(path)
    if not path.is_file():
        raise UserError(f"no images at {path}: no such file")
    with explained(f"{path} cannot be read as an npz of plain arrays", *_DAMAGE):
        if not zipfile.is_zipfile(path):
            advice = "make it with numpy.savez or `tinyfusion sample`"
            raise UserError(f"{path} is not an npz (a zip of arrays), or is truncated: {advice}")
        with zipfile.ZipFile(path) as archive:
            yield Npz(path, archive)


def is_npz(path: Path) -> bool:
    """Whether a path is a zip file named .npz."""
    return path.suffix == ".npz" and path.is_file() and zipfile.is_zipfile(path)


def read_npy(path: Path) -> np.ndarray:
    """The array of an npy file. Raises UserError if it is missing, damaged or larger than the memory."""
    with _opened_npy(path) as (file, size):
        return _read_array(file, size, "the array", path)


def npy_header(path: Path) -> ArrayHeader:
    """The header of an npy file. Raises UserError if it is missing, damaged or claims more bytes than the file has."""
    with _opened_npy(path) as (file, size):
        return _read_header(file, size, "the array")


def npy_batches(path: Path, size: int) -> Iterator[np.ndarray]:
    """Yield `size` rows of an npy file in C order at a time. Raises UserError if it is missing or damaged."""
    with _opened_npy(path) as (file, num_bytes):
        yield from _read_batches(file, num_bytes, "the array", size)


@contextmanager
def _opened_npy(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """An open npy file and its size in bytes; errors as in `opened_npz`."""
    check_plain(path)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    with file, explained(f"{path} cannot be read as a plain array", *_DAMAGE):
        yield file, os.fstat(file.fileno()).st_size


def _read_header(file: IO[bytes], size: int, where: str) -> ArrayHeader:
    """The header at the start of a stream of `size` bytes. Raises ValueError if the stream is too short for its array."""
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{where} has npy version {version}: wanted 1, 2 or 3")
    shape, fortran, dtype = reader(file)
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{where} has the shape {shape}: wanted whole numbers from 0")
    if dtype.hasobject:
        raise ValueError(f"{where} is an array of Python objects, which would have to be unpickled")
    header = ArrayHeader(tuple(shape), dtype, bool(fortran))
    available = size - file.tell()
    if header.nbytes > available:
        raise ValueError(f"{where} claims {header} ({header.nbytes:,} bytes) and holds {max(available, 0):,} bytes")
    return header


def _read_array(file: IO[bytes], size: int, where: str, path: Path) -> np.ndarray:
    header = _read_header(file, size, where)
    check_memory(header.nbytes, f"{path}: {where}, {header},")
    if not header.fortran:
        return _read_values(file, header, where)
    return _read_values(file, ArrayHeader(header.shape[::-1], header.dtype, False), where).T


def _read_batches(file: IO[bytes], num_bytes: int, where: str, size: int) -> Iterator[np.ndarray]:
    header = _read_header(file, num_bytes, where)
    for first in range(0, header.shape[0], size):
        shape = (min(size, header.shape[0] - first), *header.shape[1:])
        yield _read_values(file, ArrayHeader(shape, header.dtype, False), where)


def _read_values(file: IO[bytes], header: ArrayHeader, where: str) -> np.ndarray:
    """The next values of a stream, in C order."""
    values = np.empty(header.shape, header.dtype)
    if values.nbytes:
        target = values.reshape(-1).view(np.uint8).data
        for first in range(0, len(target), _PIECE_BYTES):
            piece = target[first : first + _PIECE_BYTES]
            content = file.read(len(piece))
            if len(content) != len(piece):
                raise ValueError(f"{where} is truncated after {first + len(content):,} of {len(target):,} bytes")
            piece[:] = content
    return values
