"""Read the tensors of a TorchScript file without running its code.

Such a file is a zip: `data.pkl` names the tensors, `data/` has their bytes, `code/` is the program, which is not read. The
unpickler knows tensors and plain containers; a class of the program becomes a dict of attributes, any other name is an error.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Holder:
    """The attributes of an object of the program, by name."""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}  # by key, as several tensors may share a storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Holder
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return lambda value, *_: value  # typed lists, and type tags
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if key not in self.storages:
            content = self.archive.read(f"{self.root}data/{key}")
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(bytearray(content), dtype=dtype) if content else empty
        values = self.storages[key]
        if values.dtype != dtype or values.numel() < count:
            raise ValueError(f"tensor {key} holds {values.numel()} values of {count}")
        return values


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def is_torch_zip(path: Path) -> bool:
    """Whether torch would read a file as a zip: by its first bytes, not by its last."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_stored(path: Path) -> None:
    """Raise UserError where a zip of torch has compressed records, or claims more bytes than the file has.

    torch compresses only programs, which are never read. Raises BadZipFile on other files.
    """
    with zipfile.ZipFile(path) as archive:
        read = [entry for entry in archive.infolist() if "/code/" not in entry.filename]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in read):
        raise UserError(f"{path} is compressed, and torch stores its files as they are: save it anew with torch.save")
    claimed, size = sum(entry.file_size for entry in read), path.stat().st_size
    if claimed > size:
        raise UserError(f"{path} is damaged: its records would take {claimed:,} bytes, and it has {size:,}")


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with tensors and a program."""
    check_plain(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return any(name.endswith("/data.pkl") for name in names) and any("/code/" in name for name in names)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript file by dotted name. Raises UserError if it is damaged or has code in its data."""
    try:
        check_stored(path)
        with zipfile.ZipFile(path) as archive:
            data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = _Reader(archive, data.removesuffix("data.pkl")).load()
    except pickle.UnpicklingError as error:
        foreign = f"{path} holds code or foreign objects ({error}), which are never run"
        raise UserError(f"{foreign}: give the state dict of the same network") from error
    except UserError:
        raise
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError, TypeError, struct.error,
            StopIteration, zipfile.BadZipFile, zlib.error, OverflowError, UnicodeDecodeError, MemoryError) as error:  # fmt: skip
        raise UserError(f"{path} is no readable TorchScript file (truncated or foreign): {error}") from error
    return dict(_flat(root, ""))


def _flat(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested modules; lists and dicts of a program have no parameters."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Holder) and depth < 32:
        for key, inner in value.attributes.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), depth + 1)
