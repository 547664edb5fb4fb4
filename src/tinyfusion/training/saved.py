"""Format of a training state on disk (`step-0000123/`): its files, and the check for damage.

    state-00000-of-00001.safetensors   tensors by name, one file per rank that had rows of them
    state.json                         everything else, and the rows of sharded tensors in each file
    SHA256SUMS                         of both, as sha256sum writes it: `sha256sum -c SHA256SUMS` checks by hand

A folder is undamaged if the sums over all of its files equal SHA256SUMS byte for byte. Reading runs no code: no file is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import sha256_of
from tinyfusion.core.tensors import TYPE_NAMES, TYPES, bytes_of, safetensors_head

FORMAT_VERSION = 2  # 1: `state.safetensors`, and its hash in state.json (tinyfusion 0.2.0)
RECORD, SUMS = "state.json", "SHA256SUMS"
Rows = tuple[int, int]  # first, number

_FORMER_TENSORS = "state.safetensors"
_PART = re.compile(r"state-[0-9]{5}-of-[0-9]{5}\.safetensors")
_PIECE = 8 * 2**20  # bytes that are written and hashed at a time


@dataclass(frozen=True)
class Progress:
    """The fields of a training state that are not tensors.

    bad_steps: number of consecutive skipped steps. optimizer: its name in the recipe. good_steps: number of steps since
    loss_scale last changed. optimizer_numbers: plain numbers in the optimiser's state, by "SLOT/PARAMETER".
    """

    step: int
    bad_steps: int
    seen_images: int
    optimizer: str
    loss_scale: float | None = None
    good_steps: int = 0
    optimizer_numbers: Mapping[str, int | float] = field(default_factory=dict)


def part_name(rank: int, num: int) -> str:
    """File name of the tensors that rank `rank` of `num` writing ranks stores."""
    return f"state-{rank:05d}-of-{num:05d}.safetensors"


def sums(digests: Mapping[str, str]) -> bytes:
    """Content of SHA256SUMS for files with these digests, sorted by name."""
    return b"".join(f"{digests[name]}  ".encode() + os.fsencode(name) + b"\n" for name in sorted(digests))


# ---------------------------------------------------------------------------------------------------------------- writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write host tensors as a safetensors file, flush it to the disk, and return its SHA-256.

    A second thread hashes the bytes while they are written, both without the GIL: twice as fast as safetensors' own
    writer and a read of the file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor stays aligned
    head = safetensors_head({name: (TYPE_NAMES[(t := tensors[name]).dtype], t.shape, t.nbytes) for name in order})
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hashing, open(path, "wb", buffering=0) as file:
        for piece in _pieces(head, (tensors[name] for name in order)):
            pending = hashing.submit(digest.update, piece)
            written = 0
            while written < len(piece):
                written += file.write(piece[written:])
            pending.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(head: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        view = bytes_of(tensor)
        for first in range(0, len(view), _PIECE):
            yield view[first : first + _PIECE]


def write_record(folder: Path, progress: Progress, split: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write state.json and SHA256SUMS. split: shape and rows per file of sharded tensors; digests: of tensor files."""
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(progress), "split": split}, indent=1, allow_nan=False)
    content = f"{text}\n".encode()
    (folder / RECORD).write_bytes(content)
    (folder / SUMS).write_bytes(sums({**digests, RECORD: hashlib.sha256(content).hexdigest()}))


# ---------------------------------------------------------------------------------------------------------------- reading


def other_version(path: Path) -> str | None:
    """The error message if a checkpoint has the format of another tinyfusion version; else None."""
    if (path / _FORMER_TENSORS).is_file() and not (path / SUMS).exists():
        written_by = "tinyfusion 0.2.0, whose training states this version does not read"
        return f"{path} was written by {written_by}: start anew (--overwrite), or continue with tinyfusion 0.2.0"
    try:
        content = (path / RECORD).read_bytes()
        line = sums({RECORD: hashlib.sha256(content).hexdigest()})
        version = json.loads(content).get("format_version")
        as_written = line in (path / SUMS).read_bytes()
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if not as_written or type(version) is not int or version == FORMAT_VERSION:
        return None
    return (
        f"{path} has format {version}, and this version of tinyfusion reads format {FORMAT_VERSION}: start anew "
        "(--overwrite), or continue with the version that wrote it"
    )


def damage(path: Path) -> str | None:
    """Read all files of a checkpoint and return a description of their damage; None if there is none."""
    try:
        entries = sorted(path.iterdir())
        for entry in entries:
            if entry.is_symlink() or not entry.is_file():
                return f"{entry.name!r} is no plain file"
        listed = (path / SUMS).read_bytes()
        rest = [entry for entry in entries if entry.name != SUMS]
        with ThreadPoolExecutor() as pool:
            digests = dict(zip((entry.name for entry in rest), pool.map(sha256_of, rest), strict=True))
    except OSError as error:
        return f"{error.strerror or error}: {Path(os.fsdecode(error.filename or '')).name or path}"
    if sums(digests) == listed:
        return None
    lines = listed.splitlines(keepends=True)
    changed = [name for name in digests if sums({name: digests[name]}) not in lines]
    return f"{changed[0]!r} is not what {SUMS} lists" if changed else f"{SUMS} lists more than there is"


def open_checkpoint(path: Path) -> SavedState:
    """Open a checkpoint with undamaged files. Raises UserError if they are no training state, OSError if they cannot be read."""
    names = sorted(entry.name for entry in path.iterdir() if entry.name not in (RECORD, SUMS))
    content = (path / RECORD).read_bytes()
    try:
        record = json.loads(content)
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {record['format_version']!r}")
        if names != [part_name(rank, len(names)) for rank in range(len(names))]:
            raise ValueError(f"files {', '.join(map(repr, names[:3]))} where {part_name(0, 1)} and the like belong")
        files = [safe_open(path / name, framework="pt") for name in names]
        return SavedState(path, _progress(record), files, record["split"])
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise UserError(f"it is no training state ({error})") from error


def _progress(record: Mapping[str, Any]) -> Progress:
    progress = Progress(**{field.name: record[field.name] for field in fields(Progress)})
    for name in ("step", "bad_steps", "seen_images", "good_steps"):
        if type(number := getattr(progress, name)) is not int or number < 0:
            raise ValueError(f"{name} is {number!r}")
    scale = progress.loss_scale
    if not (scale is None or 0 < float(scale) < math.inf) or type(progress.optimizer) is not str:
        raise ValueError(f"loss_scale is {scale!r}, optimizer {progress.optimizer!r}")
    if any(type(number) not in (int, float) for number in progress.optimizer_numbers.values()):
        raise ValueError("optimizer_numbers are not all numbers")
    return progress


class SavedState:
    """Tensors of a checkpoint, read on demand, for any number of ranks that wrote it and that read it.

    split: {name of a sharded tensor: {"shape": of the whole tensor, "rows": (first row, number of rows) per file}}.
    """

    def __init__(self, path: Path, progress: Progress, files: Sequence[Any], split: Mapping[str, Any]) -> None:
        self.path, self.progress = path, progress
        self._files = files
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[int, Rows]]] = {}  # file and rows, in the order of rows
        for name, entry in split.items():
            shape = tuple(entry["shape"])
            places = sorted((int(first), index, int(num)) for index, (first, num) in enumerate(entry["rows"]) if num)
            self._shapes[name] = shape
            self._places[name] = [(index, (first, num)) for first, index, num in places]
            ends = [0, *(first + num for first, _, num in places)]
            if ends != [*(first for first, _, _ in places), shape[0]]:
                raise ValueError(f"the rows of {name} are not all there, or are there twice")
        stored = {(index, name) for index, file in enumerate(files) for name in sorted(file.keys())}
        for name in sorted(name for index, name in stored if index == 0 and name not in split):
            self._shapes[name] = tuple(files[0].get_slice(name).get_shape())
            self._places[name] = [(0, (0, self._shapes[name][0] if self._shapes[name] else 1))]
        if stored != {(index, name) for name, places in self._places.items() for index, _ in places}:
            raise ValueError("its files hold other tensors than state.json says")
        for name, where in self._places.items():
            for index, (_, num) in where:
                shape = tuple(files[index].get_slice(name).get_shape())
                if shape and shape != (num, *self._shapes[name][1:]):
                    raise ValueError(f"{name} has {shape} in file {index}")
            self.dtype(name)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor. Raises KeyError for a dtype that a training state cannot have."""
        return TYPES[self._files[self._places[name][0][0]].get_slice(name).get_dtype()]

    def rows(self, name: str, first: int, num: int) -> Tensor:
        """Read only the `num` rows from `first`. A scalar tensor counts as one row and is returned as a scalar."""
        shape, pieces = self._shapes[name], []
        try:
            for index, (start, there) in self._places[name]:
                low, high = max(first, start), min(first + num, start + there)
                if not shape:
                    number: Tensor = self._files[index].get_tensor(name)
                    return number
                if low < high:
                    pieces.append(self._files[index].get_slice(name)[low - start : high - start])
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot read {name} ({error})", str(self.path)) from error
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if pieces else torch.empty((0, *shape[1:]), dtype=self.dtype(name))

    def whole(self, name: str) -> Tensor:
        """Read all rows of a tensor."""
        shape = self._shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1)
