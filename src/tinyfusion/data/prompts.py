"""Encoded prompts on disk: written in chunks of rows by several ranks, joined to one file without holding it in memory.

The file has K + 1 rows in every tensor, the null prompt last (`conditioning/texts.py`). Chunks whose texts have different numbers
of tokens are padded with zeros when they are joined.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import check_space, sha256_of
from tinyfusion.core.ranks import complete_file
from tinyfusion.core.reading import check_plain, read_json
from tinyfusion.core.rundir import write_json
from tinyfusion.core.tensors import TYPES, bytes_of, read_metadata, safetensors_head

PROMPTS, TEXTS = "prompts.safetensors", "prompts.json"  # in a folder of latents: encoded prompts, and their texts
CHUNK_ROWS, _LEAST_ROWS, _CHUNKS = 128, 16, 64  # rows of a chunk, which is the work that a killed process loses
_COPIED_ROWS = 8  # at a time while chunks are joined
_ALIGNMENT = 64

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class PromptFile:
    """The file of encoded prompts in a folder. num: rows, null prompt included."""

    folder: Path
    num: int

    @property
    def path(self) -> Path:
        """The joined file."""
        return self.folder / PROMPTS

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk: fewer in small files, so that every process has some."""
        return min(CHUNK_ROWS, -(-self.num // (_CHUNKS * _LEAST_ROWS)) * _LEAST_ROWS)

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.num // self.chunk_rows)

    def chunk(self, index: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"prompts-{index:05d}-of-{self.num_chunks:05d}.safetensors"

    def bounds(self, index: int) -> range:
        """The rows of a chunk."""
        return range(index * self.chunk_rows, min((index + 1) * self.chunk_rows, self.num))

    def missing(self) -> list[int]:
        """Chunks that are to be written; none where the file is complete."""
        missing = [index for index in range(self.num_chunks) if not self.chunk(index).is_file()]
        return [] if self.path.is_file() else missing  # looked for last: chunks are removed once it is complete

    def write_chunk(self, index: int, batches: Sequence[Rows], notes: Mapping[str, str]) -> None:
        """Write the rows of a chunk, of which `batches` are consecutive."""
        rows = {name: padded([batch[name] for batch in batches]) for name in batches[0]}
        with complete_file(self.chunk(index)) as temporary:
            save_file(rows, temporary, metadata=dict(notes))

    def join(self, about: Callable[[list[dict[str, str]]], Mapping[str, str]]) -> None:
        """Join all chunks to the file, whose header has the strings of `about` (of all notes), and remove them.

        Raises UserError where chunks are damaged, or do not fit together.
        """
        if not self.path.is_file():
            chunks = [self.chunk(index) for index in range(self.num_chunks)]
            shapes, types = self._shapes(chunks)
            entries = {
                name: (kind := types[name], shape, math.prod(shape) * TYPES[kind].itemsize)
                for name, shape in shapes.items()
            }
            check_space(self.folder, sum(num_bytes for _, _, num_bytes in entries.values()))
            notes = [read_metadata(chunk) for chunk in chunks]
            with complete_file(self.path) as temporary, open(temporary, "wb") as out:
                out.write(safetensors_head(entries, about(notes), _ALIGNMENT))
                for name, shape in shapes.items():
                    for chunk in chunks:
                        _copy(chunk, name, shape, out)
        for index in range(self.num_chunks):
            with contextlib.suppress(FileNotFoundError):
                self.chunk(index).unlink()

    def _shapes(self, chunks: Sequence[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shapes and types of the joined tensors, the largest last."""
        widths: dict[str, tuple[int, ...]] = {}
        types: dict[str, str] = {}
        for index, chunk in enumerate(chunks):
            check_plain(chunk)
            with _opened(chunk) as file:
                if index and set(file.keys()) != set(types):
                    raise UserError(f"{chunk} has other tensors than {chunks[0]}: remove it, and repeat the command")
                for name in file.keys():  # noqa: SIM118  # no mapping
                    tensor = file.get_slice(name)
                    num, *width = tensor.get_shape()
                    known = widths.get(name, tuple(width))
                    if (
                        num != len(self.bounds(index))
                        or tensor.get_dtype() not in TYPES
                        or len(known) != len(width)
                        or types.setdefault(name, tensor.get_dtype()) != tensor.get_dtype()
                        or known[1:] != tuple(width[1:])
                    ):
                        raise UserError(f"{chunk} does not go with {chunks[0]}: remove it, and repeat the command")
                    widths[name] = tuple(max(pair) for pair in zip(known, width, strict=True))
        ordered = sorted(widths, key=lambda name: (math.prod(widths[name]), name))
        return {name: (self.num, *widths[name]) for name in ordered}, types


def padded(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors (n, N, ...), padded with zeros to the largest N."""
    if tensors[0].ndim == 1 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([widened(tensor, longest) for tensor in tensors])


def widened(tensor: Tensor, length: int) -> Tensor:
    """(n, length, ...) of (n, N, ...), zeros after its values."""
    if tensor.ndim == 1 or tensor.shape[1] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), length - tensor.shape[1], *tensor.shape[2:])], 1)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # of safetensors and the file system
        raise UserError(f"{path} is damaged: {error}; remove it, and repeat the command") from error


def _copy(chunk: Path, name: str, shape: tuple[int, ...], out: Any) -> None:
    """Append the rows of a chunk, widened to `shape`, a few at a time."""
    with _opened(chunk) as file:
        tensor = file.get_slice(name)
        num = tensor.get_shape()[0]
        for first in range(0, num, _COPIED_ROWS):
            rows = tensor[first : first + _COPIED_ROWS]
            rows = widened(rows, shape[1]) if len(shape) > 1 else rows
            out.write(bytes_of(rows))


def write_texts(folder: Path, texts: Sequence[str]) -> None:
    """Write the texts of the rows but the null prompt."""
    write_json(folder / TEXTS, list(texts))


def read_texts(folder: Path) -> tuple[str, ...]:
    """The texts of the rows, null prompt excluded. Raises UserError where they are missing or damaged."""
    values = read_json(folder / TEXTS)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{folder / TEXTS} is damaged: wanted a list of texts")
    return tuple(values)


def spread_texts(folder: Path, most: int) -> list[str]:
    """At most so many of the texts of a folder of latents, evenly spread, without blank ones."""
    texts = [text for text in read_texts(folder) if text.strip()]
    return [texts[i] for i in np.linspace(0, len(texts) - 1, min(most, len(texts))).astype(int)]


def prompts_entry(folder: Path) -> dict[str, Any]:
    """File, size and SHA-256 of encoded prompts, for manifests."""
    path = folder / PROMPTS
    return {"file": PROMPTS, "bytes": os.stat(path).st_size, "sha256": sha256_of(path)}


def verify_prompts(folder: Path, entry: Mapping[str, Any]) -> None:
    """Raise UserError unless the prompts have the size and checksum of their entry in a manifest."""
    path = folder / PROMPTS
    if not path.is_file():
        raise UserError(f"{path} is missing: repeat its `encode` command with --overwrite")
    if path.stat().st_size != entry.get("bytes") or sha256_of(path) != entry.get("sha256"):
        raise UserError(
            f"{path} is damaged: its SHA-256 is not that of the manifest; repeat its `encode` command with --overwrite"
        )
