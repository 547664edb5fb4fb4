"""Read tensors from safetensors and torch files, whole or sharded, strictly and without running code from them."""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.reading import check_plain, check_utf8, read_json_object, unreadable
from tinyfusion.core.torchscript import check_stored, is_torch_zip

_UNREADABLE = "is no readable safetensors file (truncated or foreign)"
_NO_MODEL = "is not a model file, or it is truncated: wanted a torch file or .safetensors with a state dict"
# calls that torch's restricted reader makes and that fill memory without a tensor: zeros by number, and expanding codecs
_FILLS = re.compile(rb"c(?:builtins|__builtin__)\nbytearray\n")
_ENCODES = re.compile(rb"c_codecs\nencode\n")
_LENGTHENING = re.compile(rb"hex|base64|base_64|quopri|quoted|uu|zip|zlib|bz2")
# tensors may share memory in a file, as tied weights do: all of them together are at most this much larger than the file
_SHARED_FACTOR, _SHARED_BYTES = 4, 2**26
TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # in safetensors  # fmt: skip
TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


def read_tensor_file(path: Path) -> Any:
    """The content of a .safetensors or torch file, by its suffix."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    _check_openable(path)
    with prefixed(f"{path} {_UNREADABLE}", SafetensorError, OSError, ValueError, RuntimeError):
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file; nothing where it has none."""
    _check_openable(path)
    with prefixed(f"{path} {_UNREADABLE}", SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_pickle(path: Path) -> Any:
    """A torch file, without running code from it: only tensors, plain containers and argparse.Namespace.

    Tensors of a zip are views of the mapped file, so reading needs no extra memory.
    """
    _check_openable(path)
    try:
        mapped = is_torch_zip(path)
        if mapped:
            check_stored(path)
        _check_pickle(path, mapped)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickle protocols; unreadable files are errors below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own advice is to run the code; ours is not
        what = (
            f"holds code or foreign objects ({foreign[1]}), which are never run: save its state dict alone"
            if foreign
            else _NO_MODEL
        )
        raise UserError(f"{path} {what}") from error
    except UserError:
        raise
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError, TypeError, struct.error,
            zipfile.BadZipFile, UnicodeDecodeError, ImportError, OverflowError, AssertionError, MemoryError) as error:  # fmt: skip
        raise UserError(f"{path} {_NO_MODEL}") from error


def _check_openable(path: Path) -> None:
    """Raise UserError on a special file, and on one that is missing, may not be read, or whose name is not UTF-8."""
    check_utf8(path)
    check_plain(path)
    try:
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _check_pickle(path: Path, zipped: bool) -> None:
    """Raise UnpicklingError if the pickle of a torch file would fill memory without tensors."""
    with open(path, "rb") as file:
        if not path.stat().st_size:
            return
        if zipped:
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                filling = next(filter(None, (_filling(archive.read(name)) for name in names)), None)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                filling = _filling(content)
    if filling:
        raise pickle.UnpicklingError(f"GLOBAL {filling}")


def _filling(content: Any) -> str | None:
    """The name of a call in a pickle that fills memory."""
    if _FILLS.search(content):
        return "bytearray"
    return "encode" if _ENCODES.search(content) and _LENGTHENING.search(content) else None


def safetensors_head(
    entries: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None, alignment: int = 8
) -> bytes:
    """The bytes of a safetensors file before its tensors.

    entries: type, shape and number of bytes of the tensors, in the order of the file. metadata: strings of the header; "format"
    is "pt". alignment: of the first tensor, in bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (kind, shape, num_bytes) in entries.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text


def mapped_bytes(path: Path) -> Tensor:
    """The bytes of a file, mapped, uint8. Writing into them changes memory, not the file."""
    # torch closes the file once it is mapped; a thousand shards would else be a thousand open files
    storage: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; a view where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of(tensors: Mapping[str, Tensor], type_name: Callable[[torch.dtype], str] = TYPE_NAMES.__getitem__) -> Any:
    """The state of a SHA-256 over name, type, shape and bytes of every tensor, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{type_name(tensor.dtype)}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bytes_of(tensor))
    return digest


def check_shared(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError if tensors claim far more bytes than their file has."""
    claimed, stored = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    if claimed > _SHARED_FACTOR * stored + _SHARED_BYTES:
        raise UserError(
            f"{path} is damaged: its tensors would take {claimed / 2**20:,.0f} MiB, and it has {stored / 2**20:,.1f} MiB"
        )


def flat_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file with a flat state dict and nothing else."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    odd = next((str(name) for name, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None or not content:
        raise UserError(f"{path} is no state dict of tensors (it holds {odd or 'nothing'!r})")
    tensors = {str(name): value for name, value in content.items()}
    check_shared(tensors, path)
    return tensors


def read_folder_weights(folder: Path, stem: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a folder of diffusers or transformers, and the name of their file or index.

    stem: of the file's name. Safetensors have priority. Raises UserError on missing weights.
    """
    for name, read in ((f"{stem}.safetensors", read_safetensors), (f"{stem}.bin", read_pickle)):
        if (folder / f"{name}.index.json").is_file():
            return read_shards(folder / f"{name}.index.json", read), f"{name}.index.json"
        check_plain(folder / name)
        if (folder / name).is_file():
            return flat_tensors(read(folder / name), folder / name), name
    variants = sorted(file.name for file in folder.glob(f"{stem}*"))
    there = f"; there is {', '.join(variants)}, which is none of them" if variants else ""
    raise UserError(f"{folder} holds no weights: wanted {stem}.safetensors or .bin, whole or with an index{there}")


def shards_of_index(index: Path) -> dict[Path, set[str]]:
    """The tensors of every file that an index names (`{"weight_map": {tensor: file}}`). Raises UserError if a file is missing."""
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} is damaged: wanted a weight_map of tensors to files")
    if odd := next((name for name in files.values() if Path(name).name != name or "\0" in name), None):
        raise UserError(f"{index} names {odd!r}, which is no file in its folder")
    shards = {
        index.parent / name: {key for key, own in files.items() if own == name} for name in sorted({*files.values()})
    }
    for file in shards:
        check_plain(file)
        if not file.is_file():
            raise UserError(f"{file} does not exist, and {index.name} names it: the folder is incomplete")
    return shards


def read_shards(index: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """The tensors of all files that an index names, each read with `read`. Raises UserError if a file is missing or holds others."""
    tensors: dict[str, Tensor] = {}
    for file, names in shards_of_index(index).items():
        shard = flat_tensors(read(file), file)
        if wrong := sorted(names ^ set(shard)):
            raise UserError(f"{file} and {index.name} disagree about {wrong[0]}")
        tensors |= shard
    return tensors
