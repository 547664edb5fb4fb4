"""Weights of a folder of diffusers as byte ranges: read from headers alone, copied range by range, each in its own type."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain, check_utf8, parse_json, unreadable
from tinyfusion.core.tensors import (
    TYPE_NAMES,
    TYPES,
    flat_tensors,
    mapped_bytes,
    read_pickle,
    safetensors_head,
    shards_of_index,
)

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 10 * 10**9  # of a file, as diffusers writes them; larger models are written in several
_CHUNK_BYTES = 2**24
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
Source = Path | Tensor  # a safetensors file, or the bytes of a tensor that is mapped from a torch file


@dataclass(frozen=True)
class Stored:
    """A tensor in files: its type and shape, and the byte ranges (source, start, stop) that it consists of."""

    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[Source, int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return sum(stop - start for _, start, stop in self.ranges)

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def chunks(self, order: Sequence[tuple[int, int]]) -> Stored:
        """The tensor of some equal chunks along axis 0, (chunk, chunks in all) each, concatenated; itself where there are none."""
        if not order:
            return self
        ((source, start, _),) = self.ranges
        number = order[0][1]
        if self.shape[0] % number:
            where = source if isinstance(source, Path) else "the torch file"
            raise UserError(f"{where} is damaged: a modulation of {self.shape[0]} rows has no {number} equal chunks")
        size = self.num_bytes // number
        ranges = tuple((source, start + chunk * size, start + (chunk + 1) * size) for chunk, _ in order)
        rows = len(order) * (self.shape[0] // number)
        return Stored(self.dtype, (rows, *self.shape[1:]), ranges)


Weights = Mapping[str, Stored]


def stored_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder of diffusers: one file, or shards with an index, also of a variant such as fp16.

    Safetensors come before torch files, of which no code is run. Raises UserError where there are none, several variants and no
    plain file, a shard is missing, or a header is damaged.
    """
    files = _files(folder, "safetensors") or _files(folder, "bin")
    if not files:
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix != ".json")) or "none of them"
        raise UserError(
            f"{folder} wants {STEM}.safetensors or .bin, whole or with an index, or one variant of it; there is {there}"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in (_header(file) if file.suffix == ".safetensors" else _torch_file(file)).items():
            if name in tensors:
                raise UserError(f"{file} holds {name}, and so does another file of {folder}: remove one of the two")
            tensors[name] = stored
    return tensors


def _files(folder: Path, suffix: str) -> list[Path]:
    """The files of a format; none where there are none. Raises UserError where there are several variants and no plain file."""
    plain, indexed = folder / f"{STEM}.{suffix}", folder / f"{STEM}.{suffix}.index.json"
    if plain.is_file() or indexed.is_file():
        return list(shards_of_index(indexed)) if indexed.is_file() else [plain]
    indices = sorted(folder.glob(f"{STEM}.{suffix}.index.*.json")) + sorted(
        folder.glob(f"{STEM}.*.{suffix}.index.json")
    )
    whole = sorted(path for path in folder.glob(f"{STEM}.*.{suffix}") if "-of-" not in path.name)
    variants = [*indices, *whole]
    if len(variants) > 1:
        names = ", ".join(path.name for path in variants)
        raise UserError(f"{folder} holds several variants, {names}: leave one of them there")
    return list(shards_of_index(indices[0])) if indices else whole


def _header(file: Path) -> dict[str, Stored]:
    check_utf8(file)
    check_plain(file)
    try:
        with safe_open(file, framework="numpy"):  # its checks: sizes of types and shapes, ranges without gaps
            pass
        with open(file, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            entries = parse_json(stream.read(size).decode("utf-8"), str(file))
    except (SafetensorError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{file} is no readable safetensors file (truncated or foreign): {error}") from error
    except OSError as error:
        raise unreadable(file, error) from error
    entries.pop("__metadata__", None)
    if odd := next((each["dtype"] for each in entries.values() if each["dtype"] not in _BITS), None):
        raise UserError(f"{file} holds tensors of type {odd}; wanted one of {', '.join(_BITS)}")
    begin = 8 + size
    return {
        name: Stored(each["dtype"], tuple(each["shape"]), ((file, *(begin + at for at in each["data_offsets"])),))
        for name, each in entries.items()
    }


def _torch_file(file: Path) -> dict[str, Stored]:
    """The tensors of a torch file, mapped. Raises UserError on code, and on tensors that safetensors cannot hold."""
    found = {}
    for name, tensor in flat_tensors(read_pickle(file), file).items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in TYPE_NAMES:
            raise UserError(
                f"{file} holds {name}, a tensor of type {tensor.dtype} ({tensor.layout}): wanted plain numbers"
            )
        found[name] = stored_tensor(tensor, TYPE_NAMES[tensor.dtype])
    return found


def stored_tensor(tensor: Tensor, dtype: str) -> Stored:
    """A tensor in memory, rounded to `dtype`, as one that can be written."""
    content = tensor.detach().cpu().to(TYPES[dtype]).contiguous().reshape(-1).view(torch.uint8)
    return Stored(dtype, tuple(tensor.shape), ((content, 0, len(content)),))


def mapped_tensors(weights: Weights) -> dict[str, Tensor]:
    """The tensors, each in its type: mapped from their files, without a copy where a tensor is one aligned range.

    Writing into them changes memory, not the files. Raises UserError on a type that torch has not.
    """
    maps: dict[Path, Tensor] = {}

    def content(source: Source, start: int, stop: int) -> Tensor:
        if isinstance(source, Tensor):
            return source[start:stop]
        if source not in maps:
            maps[source] = mapped_bytes(source)
        return maps[source][start:stop]

    tensors = {}
    for name, stored in weights.items():
        if stored.dtype not in TYPES:
            raise UserError(f"{name} is of type {stored.dtype}, in which no model runs")
        kind = TYPES[stored.dtype]
        chunks = [content(*each) for each in stored.ranges]
        values = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        if values.storage_offset() % kind.itemsize:
            values = values.clone()
        tensors[name] = values.view(kind).view(stored.shape)
    return tensors


def hash_stored(weights: Weights) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor, sorted by name, as stored: the hash of a family."""
    digest = hashlib.sha256()
    with ExitStack() as files:
        streams: dict[Path, BinaryIO] = {}
        for name in sorted(weights):
            stored = weights[name]
            digest.update(f"{name}\0{stored.dtype}\0{stored.shape}\0".encode())
            for chunk in _bytes_of(stored, streams, files):
                digest.update(chunk)
    return digest.hexdigest()


def _bytes_of(stored: Stored, streams: dict[Path, BinaryIO], files: ExitStack) -> Iterator[memoryview]:
    """The bytes of a tensor, a few MiB at a time, in one buffer that is used again. streams: files that are open already."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(stored.num_bytes, 1))))
    for path, start, stop in stored.ranges:
        if isinstance(path, Tensor):
            yield path[start:stop].numpy().data
            continue
        if path not in streams:
            streams[path] = files.enter_context(path.open("rb"))
        stream = streams[path]
        stream.seek(start)
        while start < stop:
            read = stream.readinto(buffer[: min(len(buffer), stop - start)])  # type: ignore[attr-defined]
            if not read:
                raise UserError(f"{path} has become shorter while it was read")
            yield buffer[:read]
            start += read


def write_weights(weights: Weights, folder: Path) -> None:
    """Write tensors into a folder as diffusers does: one file, or shards with an index. A few MiB of memory at any size."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name in sorted(weights):
        if shards[-1] and size + weights[name].num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weights[name]
        size += weights[name].num_bytes
    if len(shards) == 1:
        write_file(shards[0], folder / f"{STEM}.safetensors")
        return
    names = [f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(shard, folder / name)
    placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(stored.num_bytes for stored in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(weights: Weights, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, range by range. metadata: strings of its header; "format" is "pt"."""
    names = sorted(weights, key=lambda name: (-_BITS[weights[name].dtype], name))  # wide types first: all are aligned
    entries = {name: (weights[name].dtype, weights[name].shape, weights[name].num_bytes) for name in names}
    with ExitStack() as files:
        streams: dict[Path, BinaryIO] = {}
        out = files.enter_context(open(path, "wb"))
        out.write(safetensors_head(entries, metadata))
        for name in names:
            for chunk in _bytes_of(weights[name], streams, files):
                out.write(chunk)
