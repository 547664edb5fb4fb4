"""Latents on disk: shards with a manifest, and training batches of them.

A shard is a safetensors file: labels (n,) int64, then the values of every image, row by row, so that it can be mapped, and
appended to while it is written. Values are `moments` (n, R, 2 C, h, w), mean and log-variance of the autoencoder's posterior,
or `samples` (n, R, C, h, w), drawn once and scaled as models see them. R is 2 with mirrored copies, else 1. Videos have an axis
of frames before the height.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from tinyfusion.config.constraints import Count, Side
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.files import sha256_of
from tinyfusion.core.locks import is_at, try_lock
from tinyfusion.core.reading import check_plain, read_json
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import write_json
from tinyfusion.core.tensors import TYPE_NAMES, bytes_of, mapped_bytes, safetensors_head
from tinyfusion.data.batches import ArrayBatch, ShuffledRows

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATENTS = "latents:"  # prefix of a data set that is such a folder
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_VERIFIED_BYTES = 2**30  # sets up to here are verified by their sums when they are opened
_ALIGNMENT = 64
_IN_CACHE = 32  # images that are sampled at a time


@dataclass(frozen=True)
class LatentSpec:
    """Specification of a set; it and the images determine the bytes of its shards.

    kind: moments or samples. rows: 2 with mirrored copies, else 1. shape: (C, h, w) of a latent, or (C, F, h, w). classes: one
    more than the largest label. scale, shift: models see (z - shift) x scale of a latent z.
    """

    num_images: Count
    shard_images: Count
    kind: str
    dtype: str
    rows: int
    shape: tuple[int, ...]
    classes: int
    scale: float
    shift: float

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.num_images // self.shard_images)

    @property
    def values(self) -> tuple[int, ...]:
        """(R, 2 C or C, h, w), or (R, 2 C or C, F, h, w): stored values of an image."""
        return self.rows, self.shape[0] * (2 if self.kind == "moments" else 1), *self.shape[1:]

    @property
    def image_bytes(self) -> int:
        """Bytes of one image in its shard, without the label."""
        return math.prod(self.values) * _TORCH[self.dtype].itemsize

    def bounds(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and their number."""
        first = shard * self.shard_images
        return first, min(self.shard_images, self.num_images - first)

    def file_name(self, shard: int) -> str:
        """Such as shard-00003-of-00012.safetensors."""
        return f"shard-{shard:05d}-of-{self.shards:05d}.safetensors"

    def head(self, shard: int) -> bytes:
        """The bytes of a shard before its labels."""
        _first, num = self.bounds(shard)
        values = (TYPE_NAMES[_TORCH[self.dtype]], (num, *self.values), num * self.image_bytes)
        return safetensors_head({"labels": ("I64", (num,), 8 * num), self.kind: values}, alignment=_ALIGNMENT)

    def begin(self, shard: int) -> int:
        """Offset of the values of a shard in its file."""
        return len(self.head(shard)) + 8 * self.bounds(shard)[1]

    def shard_bytes(self, shard: int) -> int:
        """Size of the file of a shard."""
        return self.begin(shard) + self.bounds(shard)[1] * self.image_bytes


def encoded_values(values: Tensor, dtype: str) -> bytes:
    """Bytes of values (n, R, K, h, w) float32 in a shard."""
    return bytes_of(values.detach().cpu().to(_TORCH[dtype])).tobytes()


def _part(folder: Path, spec: LatentSpec, shard: int, labels: np.ndarray) -> tuple[Path, bytes]:
    """Path of an unfinished shard, and the bytes before its values."""
    start = spec.head(shard) + np.ascontiguousarray(labels, "<i8").tobytes()
    return folder / f".{spec.file_name(shard)}.part", start


def images_in_part(folder: Path, spec: LatentSpec, shard: int, labels: np.ndarray) -> int:
    """Images that an ended process left in an unfinished shard of this set."""
    path, start = _part(folder, spec, shard, labels)
    check_plain(path)
    try:
        with open(path, "rb") as file:
            if file.read(len(start)) != start:
                return 0
            return min((os.fstat(file.fileno()).st_size - len(start)) // spec.image_bytes, spec.bounds(shard)[1])
    except FileNotFoundError:
        return 0


@contextmanager
def unfinished_shard(
    folder: Path, spec: LatentSpec, shard: int, labels: np.ndarray, keep: int
) -> Iterator[Callable[[bytes], None]]:
    """Append to a shard, of which the first `keep` images exist; at the end of the block it is complete and renamed.

    If the block fails, what was written stays. Raises UserError if another process writes the same shard or the folder was
    removed.
    """
    path, start = _part(folder, spec, shard, labels)
    whole = folder / spec.file_name(shard)
    check_plain(path)
    check_plain(whole)
    try:
        with open(path, "ab") as file:
            if try_lock(file) is False or not is_at(file.fileno(), path):  # or it has just become a whole shard
                advice = "give every process its own RANK of one WORLD_SIZE, or wait for it"
                raise UserError(f"another process writes {path} right now: {advice}")
            if keep:
                file.truncate(len(start) + keep * spec.image_bytes)
            else:
                file.truncate(0)
                file.write(start)
                file.flush()

            def append(content: bytes) -> None:
                file.write(content)
                file.flush()

            yield append
            size, wanted = os.fstat(file.fileno()).st_size, spec.shard_bytes(shard)
            if size != wanted:
                raise RuntimeError(f"{path} has {size} bytes, wanted {wanted}")
            os.fsync(file.fileno())
            check_plain(whole)
            os.replace(path, whole)
    except FileNotFoundError as error:
        what = "was removed or emptied while it was being written: start the same command again"
        raise UserError(f"{folder} {what}") from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_manifest(folder: Path, spec: LatentSpec, about: Mapping[str, Any]) -> None:
    """Write the manifest, with the checksums of all shards on disk. about: more fields, to read and to check."""
    shards = [
        {"file": spec.file_name(k), "bytes": spec.shard_bytes(k), "sha256": sha256_of(folder / spec.file_name(k))}
        for k in range(spec.shards)
    ]
    values = {"made_by": "tinyfusion", "format_version": FORMAT_VERSION, **asdict(spec), **about, "shards": shards}
    write_json(folder / MANIFEST, values)


@dataclass(frozen=True)
class LatentSet:
    """An opened set: labels (N,) int64 in memory, values mapped.

    about: the manifest. maps: per shard (n, R, K, h, w), float32, or int16 where the bits are those of bfloat16.
    """

    folder: Path
    spec: LatentSpec
    about: Mapping[str, Any]
    labels: np.ndarray
    maps: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return self.spec.num_images

    def gather(self, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(n, K, h, w) float32: stored values of these images, of their mirrored copies where `mirrored`.

        Raises UserError on values that are not finite, naming the shard.
        """
        out = np.empty((len(rows), *self.spec.values[1:]), self.maps[0].dtype)
        shards, places = np.divmod(rows, self.spec.shard_images)
        indices = zip(shards.tolist(), places.tolist(), mirrored.astype(int).tolist(), strict=True)
        for i, (shard, place, copy) in enumerate(indices):
            out[i] = self.maps[shard][place, copy]
        values = torch.from_numpy(out)
        values = values.view(torch.bfloat16).float() if values.dtype == torch.int16 else values
        if not math.isfinite(float(values.numpy().sum())) and not bool(torch.isfinite(values).all()):
            bad = int(rows[int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])])
            path = self.folder / self.spec.file_name(bad // self.spec.shard_images)
            raise _damaged(path, f"image {bad} has values that are not finite (NaN or infinity)")
        return values


def verify(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise UserError on the first shard whose checksum is not that of the manifest."""
    for entry in about["shards"]:
        if sha256_of(folder / entry["file"]) != entry["sha256"]:
            raise _damaged(folder / entry["file"], "its SHA-256 is not that of the manifest")


def open_latents(folder: Path) -> LatentSet:
    """Open a set. Sizes of all files are checked, up to 1 GiB also their checksums. Raises UserError on damaged sets."""
    spec, about = read_manifest(folder)
    labels, maps = [], []
    for shard in range(spec.shards):
        label, values = _mapped(folder / spec.file_name(shard), spec, shard)
        labels.append(label)
        maps.append(values)
    if sum(spec.shard_bytes(shard) for shard in range(spec.shards)) <= _VERIFIED_BYTES:
        verify(folder, about)
    known = np.concatenate(labels)
    if known.min() < 0 or known.max() >= spec.classes:
        raise UserError(f"{folder} is damaged: labels {known.min()} to {known.max()} of {spec.classes} classes")
    return LatentSet(folder, spec, about, known, tuple(maps))


def read_manifest(folder: Path) -> tuple[LatentSpec, Mapping[str, Any]]:
    """The specification of a set and all of its manifest. Raises UserError where it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        advice = "wanted a folder of `tinyfusion encode`"
        if (folder / "run.json").is_file():
            advice = "`encode` has not finished it, the same command continues"
        raise UserError(f"{folder} has no {MANIFEST}: {advice}")
    about = read_json(path)
    if not isinstance(about, dict) or about.get("made_by") != "tinyfusion":
        raise UserError(f"{path} is no manifest of latents of `tinyfusion encode`")
    if (version := about.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}; this version reads {FORMAT_VERSION}: upgrade")
    return _spec(folder, about), about


@dataclass(frozen=True)
class _Shard:
    """An entry of a manifest's `shards`."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Notes:
    """Other fields of a manifest that are read. size: side of the pictures in pixels; vae: the autoencoder's name."""

    shards: list[_Shard]
    size: Side | None = None
    vae: str | None = None


def _spec(folder: Path, about: Mapping[str, Any]) -> LatentSpec:
    """The specification in a manifest. Raises UserError where its numbers are invalid or contradict each other."""
    with prefixed(f"{folder / MANIFEST} is damaged"):
        spec: LatentSpec = build_known(LatentSpec, about, "")
        notes: _Notes = build_known(_Notes, about, "")
    sizes = (spec.num_images, spec.shard_images, spec.classes, *spec.shape, 1 if notes.size is None else notes.size)
    sound = (
        spec.kind in ("moments", "samples") and spec.dtype in _TORCH and spec.rows in (1, 2) and min(sizes) > 0
        and len(spec.shape) in (3, 4) and spec.scale > 0 and spec.shards == len(notes.shards)
        and all((shard.file, shard.bytes) == (spec.file_name(k), spec.shard_bytes(k)) for k, shard in enumerate(notes.shards))
    )  # fmt: skip
    if not sound:
        raise UserError(f"{folder / MANIFEST} is damaged: its numbers do not go together")
    return spec


def _mapped(path: Path, spec: LatentSpec, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and mapped values, of one shard."""
    if not path.is_file():
        raise UserError(f"{path} is missing: repeat its `encode` command to write it again")
    wanted, size = spec.shard_bytes(shard), path.stat().st_size
    head, (_first, num) = spec.head(shard), spec.bounds(shard)
    if size != wanted:
        raise _damaged(path, f"it has {size:,} bytes, wanted {wanted:,}")
    with open(path, "rb") as file:
        if file.read(len(head)) != head:
            raise _damaged(path, "its header is another one")
        labels = np.frombuffer(file.read(8 * num), "<i8")
    flat = mapped_bytes(path).numpy()[spec.begin(shard) :]
    values = flat.view(np.float32 if spec.dtype == "float32" else np.int16)
    return labels.astype(np.int64), values.reshape(num, *spec.values)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; remove it, and repeat its `encode` command to write it again")


@cache
def _quantiles() -> np.ndarray:
    """(65,536,) float32: the normal distribution at the middles of as many equal parts, brought to variance 1."""
    values = ndtri((np.arange(2**16) + 0.5) / 2**16)
    return (values / np.sqrt((values**2).mean())).astype(np.float32)


def posterior_noise(draws: Draws, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """A function that gives the noise of the next `num` samples, (num, *shape) float32, from the first of `draws` on.

    Normal in 65,536 steps up to 4.2: 16 random bits each, a ninth of the time of `draws.normal`. The posterior is narrow, so
    that a step of the noise is far below the rounding of later operations.
    """
    per_sample = math.prod(shape)
    words = draws.words_in_turn("posterior", -(-per_sample // 4))

    def following(num: int) -> Tensor:
        numbers = np.ascontiguousarray(words(num), "<u8").view("<u2")[:, :per_sample]
        values = np.empty((num, per_sample), np.float32)
        np.take(_quantiles(), numbers, out=values, mode="wrap")  # no number is out of range; looking for one takes time
        return torch.from_numpy(values.reshape(num, *shape))

    return following


class LatentBatches(ShuffledRows):
    """Training batches of a set of latents, exactly shuffled; of moments, a new sample at every read.

    flip: probability of the mirrored copy. Samples, copies and order are addressed by (seed, step, sample), so they do not
    depend on processes and resumption.
    """

    def __init__(self, latents: LatentSet, randomness: Randomness, device: torch.device, flip: float = 0.0) -> None:
        if flip and latents.spec.rows == 1:
            missing = f"{latents.folder} has no mirrored copies"
            raise UserError(f"data.flip is {flip:g}, and {missing}: encode with encode.mirror=true")
        super().__init__(randomness, device, flip=flip)
        self.latents = latents
        self.labels = torch.from_numpy(latents.labels)
        self.classes, self.shape = latents.spec.classes, latents.spec.shape

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, first: int, num: int) -> tuple[Tensor, Tensor]:
        """As in `Batches`: not mirrored, of moments the means."""
        rows = self.picked(first, num)
        stored = self.latents.gather(rows.numpy(), np.zeros(num, bool))
        if self.latents.spec.kind == "moments":
            stored = self._scale(stored.chunk(2, dim=1)[0].contiguous())
        return stored, self.labels[rows]

    def __call__(self, step: int, batch_size: int, draws: Draws) -> ArrayBatch:
        """The latents of `step`."""
        return self.at(step * batch_size + draws.first, draws)

    def at(self, first: int, draws: Draws) -> ArrayBatch:
        """The latents at the positions from `first` on of the sequence, as many as there are draws."""
        rows = self.picked(first, draws.num)
        mirrored = draws.uniform("flip") < self.flip if self.flip else np.zeros(draws.num, bool)
        if self.latents.spec.kind == "moments":
            return self._batch(self._sampled(rows.numpy(), mirrored, draws), self.labels[rows])
        return self._batch(self.latents.gather(rows.numpy(), mirrored), self.labels[rows])

    def _sampled(self, rows: np.ndarray, mirrored: np.ndarray, draws: Draws) -> Tensor:
        """(n, C, h, w) of moments, a few images at a time, which stay in the processor's cache."""
        spec = self.latents.spec
        noise = posterior_noise(draws, spec.shape)
        x = torch.empty(len(rows), *spec.shape)
        for first in range(0, len(rows), _IN_CACHE):
            part = slice(first, first + _IN_CACHE)
            mean, log_variance = self.latents.gather(rows[part], mirrored[part]).chunk(2, dim=1)
            sampled = torch.mul(log_variance, 0.5, out=x[part]).exp_().mul_(noise(len(mean))).add_(mean)
            self._scale(sampled)
        return x

    def _scale(self, x: Tensor) -> Tensor:
        """Latents as models see them, in place."""
        spec = self.latents.spec
        return (x.sub_(spec.shift) if spec.shift else x).mul_(spec.scale)
