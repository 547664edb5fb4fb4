"""`encode`: encode pictures to latents on disk with any number of processes, or convert the published layout.

Rank k of n writes the shards k, k + n, ... and rank 0 the manifest (`core/ranks.py`). An interrupted shard is continued.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.config.recipe import EncodeSection, Orientation, Recipe
from tinyfusion.core.ahead import Ahead
from tinyfusion.core.errors import UserError
from tinyfusion.core.launch import launched_processes, launched_rank
from tinyfusion.core.progress import progress, say
from tinyfusion.core.ranks import check_overwrite, wait_for_files, wait_until
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, check_space
from tinyfusion.data.batches import LOOKED_AT, scale_remarks
from tinyfusion.data.latents import (
    LatentSpec,
    encoded_values,
    images_in_part,
    read_manifest,
    unfinished_shard,
    verify,
    write_manifest,
)
from tinyfusion.data.originals import Originals, changed, decoded, open_originals
from tinyfusion.data.picture import Picture, Size, decode
from tinyfusion.data.published_latents import FEATURES, PUBLISHED_SCALE, PublishedLatents, open_published
from tinyfusion.jobs.assemble import RunOptions, job_record, own_device, plain_recipe
from tinyfusion.jobs.estimate import announce, rounded
from tinyfusion.models.autoencoder import Autoencoder, open_autoencoder
from tinyfusion.models.latent_space import LatentSpace

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
DEFAULT_SIZE = 256
_AHEAD = 3  # batches of pictures decoded while the autoencoder computes
_PASSING_VALUES = 6  # activations of the size of its widest layer that an autoencoder has at once
_WIDEST = 128  # channels of that layer at full size


@dataclass
class Work:
    """A set to be encoded.

    load(first, num): runs on another thread. values(loaded, first): (num, R, K, h, w) float32. about: further fields of the
    manifest. remarks: lines to print. busy_s: seconds of the autoencoder. changes: counts of changes to pictures.
    """

    spec: LatentSpec
    labels: np.ndarray
    load: Callable[[int, int], Tensor]
    values: Callable[[Tensor, int], Tensor]
    about: dict[str, Any]
    inputs: dict[str, Any]
    remarks: tuple[str, ...] = ()
    busy_s: float = 0.0
    changes: Counter[str] = field(default_factory=Counter)


def encode(recipe: Recipe, options: RunOptions, source: str | None, prompts: Path | None = None) -> dict[str, Any]:
    """Write the shards of this rank; rank 0 also writes the manifest. Returns the outcome for `--json`.

    prompts: only with a pipeline, see `encode_captions`.
    """
    if source is None:
        raise UserError("encode needs --data, or with --pipeline also --prompts")
    _check_classes(recipe.encode, prompts)
    recipe = dataclasses.replace(recipe, encode=of_classes(recipe.encode))
    rank, world = launched_rank(), launched_processes()
    run = RunDirectory(options.out, rank == 0)
    work = work_for(recipe, source)
    # what identifies the same command: with the default autoencoder, and no orientation of latents
    orientation: Orientation = "ignore" if source.startswith(FEATURES) else recipe.encode.orientation
    settings = dataclasses.replace(recipe.encode, vae=recipe.encode.vae or DEFAULT_VAE, orientation=orientation)
    recipe = dataclasses.replace(recipe, encode=settings)
    plain = plain_recipe(recipe, "encode", **work.inputs)
    check_overwrite(options.out, run.record_path.exists(), options.overwrite, world)
    mode = run.check("encode", plain, options.overwrite) if rank == 0 or run.record_path.exists() else "new"
    todo = missing_shards(options.out, work.spec) if mode != "new" else list(range(work.spec.shards))
    check_space(options.out, sum(work.spec.shard_bytes(shard) for shard in todo))
    if todo:
        say(work.remarks)
    if options.dry_run:
        return announce_plan(work, settings, source, todo, world, mode, rank == 0)
    if mode == "finished" and not todo:
        run.tidy()
        return _verified(options.out, rank)
    if rank > 0:
        wait_until(run.record_path.is_file, options.out, recipe.compute.timeout_s)
        run.check("encode", plain, overwrite=False)
        write_shards(work, options.out, settings, recipe.compute.timeout_s)
        return {"rank": rank}
    with run.writing("encode", plain, options.overwrite):
        run.mark("running", job={**job_record(recipe, options), "data": source})
        began, done = time.perf_counter(), write_shards(work, options.out, settings, recipe.compute.timeout_s)
        say(changed(source, done, work.changes))
        outcome = speed(done, time.perf_counter() - began, work.busy_s, world)
        writers = {options.out / work.spec.file_name(shard): shard % world for shard in range(work.spec.shards)}
        wait_for_files(writers, world, recipe.compute.timeout_s)
        write_manifest(options.out, work.spec, work.about)
        run.mark("done", **outcome)
    return outcome


# ----------------------------------------------------------------------------------------------------------- the set


def of_classes(settings: EncodeSection) -> EncodeSection:
    """The settings with the defaults of pictures of classes."""
    mirror = True if settings.mirror is None else settings.mirror
    return dataclasses.replace(settings, size=settings.size or DEFAULT_SIZE, mirror=mirror)


def _check_classes(settings: EncodeSection, prompts: Path | None) -> None:
    """Raise UserError on settings that only a pipeline has a use for."""
    given = {
        "--prompts": prompts, "encode.caption_column": settings.caption_column, "encode.sizes": settings.sizes,
        "encode.frames": settings.frames, "encode.max_tokens": settings.max_tokens,
    }  # fmt: skip
    if odd := next((name for name, value in given.items() if value is not None), None):
        raise UserError(
            f"{odd} is for pictures with captions, encoded for a pipeline of diffusers: give --pipeline too"
        )


def work_for(recipe: Recipe, source: str) -> Work:
    """Open the source and the autoencoder. Raises UserError where either is missing or they do not fit."""
    recipe = dataclasses.replace(recipe, encode=of_classes(recipe.encode))
    if source.startswith(FEATURES):
        published = open_published(Path(source.removeprefix(FEATURES)))
        return _converting(recipe.encode, published, open_autoencoder(recipe.encode.vae) if recipe.encode.vae else None)
    originals = open_originals(source)
    vae = open_autoencoder(recipe.encode.vae or DEFAULT_VAE)
    size = recipe.encode.size or DEFAULT_SIZE
    check_multiple("encode.size", size, vae.factor, f"a latent cell of {vae.name}")
    vae.module.to(own_device(recipe))
    return encoding_work(recipe, originals, vae, (vae.channels, size // vae.factor, size // vae.factor), size)


def check_multiple(field: str, side: int, multiple: int, what: str) -> None:
    """Raise UserError on a side that is no multiple of the pixels of `what`."""
    if side % multiple:
        below = side - side % multiple
        raise UserError(
            f"{field} {side} is no multiple of {multiple}, the pixels of {what}: "
            f"take {' or '.join(str(n) for n in (below, below + multiple) if n)}"
        )


def encoding_work(
    recipe: Recipe,
    originals: Originals,
    vae: Autoencoder | LatentSpace,
    shape: tuple[int, ...],
    size: Size,
    reader: Callable[[Any, str, Size | None, Orientation], Picture] = decode,
    digest: str = "",
) -> Work:
    """The encoding of pictures of one size to latents of a shape, or of clips, which `reader` gives as pixels (F, H, W, 3).

    The autoencoder is on the recipe's device once values are computed. digest: its hash, where it was counted already.
    """
    settings, device = recipe.encode, own_device(recipe)
    exact = isinstance(vae, LatentSpace) and vae.exact
    kind = "samples" if exact or settings.posterior == "mode" else settings.posterior
    classes, rows = max(int(originals.labels.max()) + 1, len(originals.classes)), 1 + bool(settings.mirror)
    spec = LatentSpec(
        len(originals), settings.shard_images, kind, settings.dtype, rows, shape, classes, vae.scale, vae.shift
    )

    def load(first: int, num: int) -> Tensor:
        taken = decoded(originals, size, settings.orientation, first, num, reader)
        pictures = [picture for _where, picture in taken]
        work.changes.update(change for picture in pictures for change in picture.changes)
        pixels = torch.from_numpy(np.stack([picture.in_colour for picture in pictures])).movedim(-1, 1)
        return pixels.pin_memory() if device.type == "cuda" else pixels

    def values(pixels: Tensor, first: int) -> Tensor:
        x = pixels.to(device, non_blocking=True).float().div_(255).sub_(0.5).div_(0.5)
        both = torch.cat([x, x.flip(-1)]) if settings.mirror else x
        began = time.perf_counter()
        moments = vae.moments(both.contiguous()).cpu()
        work.busy_s += time.perf_counter() - began
        stacked = moments.unflatten(0, (spec.rows, len(x))).transpose(0, 1)  # (num, R, 2C, h, w)
        finite = torch.isfinite(stacked).flatten(1).all(1)
        if not bool(finite.all()):
            bad = first + int((~finite).nonzero()[0])
            raise UserError(
                f"the autoencoder gives values that are not finite for image {bad}: its weights or the device are at fault"
            )
        if kind == "moments":
            return stacked
        noise = torch.zeros(len(x), spec.rows, *shape)
        if settings.posterior == "samples":
            draws = Randomness(recipe.seed).at(0, first, len(x))
            noise = torch.from_numpy(draws.normal("posterior", (spec.rows, *shape)))
        return vae.latents(stacked.flatten(0, 1), noise.flatten(0, 1)).unflatten(0, (len(x), spec.rows))

    digest = digest or vae.hash()
    about = {
        "size": size if isinstance(size, int) else None, "crop": "centre: halved by box, then bicubic",
        "orientation": settings.orientation, "vae": vae.name, "vae_hash": digest,
        "data": originals.fingerprint, "class_names": list(originals.classes),
        "seed": recipe.seed if settings.posterior == "samples" else None,
    }  # fmt: skip
    inputs = {"data": originals.fingerprint, "vae_hash": digest}
    work = Work(spec, originals.labels, load, values, about, inputs, originals.remarks)
    return work


def _converting(settings: EncodeSection, published: PublishedLatents, vae: Autoencoder | None) -> Work:
    """Convert published latents. vae: their autoencoder, None for that of the published scripts."""
    rows, channels, height, width = published.shape
    if vae is not None and vae.channels != channels:
        raise UserError(
            f"{published.features} has latents of {channels} channels, and the autoencoder {vae.name} makes {vae.channels}: "
            "give their autoencoder as --vae"
        )
    copies = rows if settings.mirror else 1
    scale, shift = (vae.scale, vae.shift) if vae else (PUBLISHED_SCALE, 0.0)
    spec = LatentSpec(
        len(published), settings.shard_images, "samples", settings.dtype, copies, (channels, height, width),
        int(published.labels.max()) + 1, scale, shift,
    )  # fmt: skip
    remarks = scale_remarks(published.read(0, min(len(published), LOOKED_AT)), str(published.features))
    digest = vae.hash() if vae else None
    about: dict[str, Any] = {
        "size": vae.factor * width if vae else None, "crop": None, "orientation": None, "vae": vae.name if vae else None,
        "vae_hash": digest, "data": published.fingerprint, "class_names": [], "seed": None,
    }  # fmt: skip
    inputs = {"data": published.fingerprint, "vae_hash": digest}
    return Work(
        spec, published.labels, published.read, lambda loaded, _first: loaded[:, :copies], about, inputs, tuple(remarks)
    )


# --------------------------------------------------------------------------------------------------------------- shards


def missing_shards(folder: Path, spec: LatentSpec) -> list[int]:
    """Shards without a complete file."""
    return [shard for shard in range(spec.shards) if not (folder / spec.file_name(shard)).is_file()]


def write_shards(work: Work, folder: Path, settings: EncodeSection, timeout_s: float, offset: int = 0) -> int:
    """Write the missing shards of this rank. offset: shards of other sets before them. Returns the number of images."""
    rank, world = launched_rank(), launched_processes()
    mine = [shard for shard in missing_shards(folder, work.spec) if (offset + shard) % world == rank]
    batches = list(_batches(work, folder, mine, settings.batch_size))
    total, done = sum(num for _shard, _first, num in batches), 0
    title = "encode" if world == 1 else f"encode ({rank + 1} of {world})"

    def load(k: int) -> Tensor:
        _shard, first, num = batches[k]
        return work.load(first, num)

    what = "pictures of batch"
    with (
        Ahead(load, _AHEAD, end=len(batches), timeout_s=timeout_s, what=what) as ahead,
        progress(title, total, "images", shown=rank == 0) as bar,
    ):
        for shard, members in groupby(enumerate(batches), key=lambda item: item[1][0]):
            begin, num = work.spec.bounds(shard)
            labels = work.labels[begin : begin + num]
            numbered = list(members)
            keep = numbered[0][1][1] - begin
            with unfinished_shard(folder, work.spec, shard, labels, keep) as append:
                for k, (_shard, first, size) in numbered:
                    append(encoded_values(work.values(ahead.take(k), first), work.spec.dtype))
                    done += size
                    bar(done)
    return total


def _batches(work: Work, folder: Path, shards: list[int], size: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first image, number of images) of all batches, counted from the beginning of a shard.

    At least one batch of every shard is computed, so that an unfinished shard with all of its values is completed too.
    """
    for shard in shards:
        begin, num = work.spec.bounds(shard)
        there = images_in_part(folder, work.spec, shard, work.labels[begin : begin + num])
        for first in range(min(there // size, (num - 1) // size) * size, num, size):
            yield shard, begin + first, min(size, num - first)


# ------------------------------------------------------------------------------------------------------------- messages


def _verified(folder: Path, rank: int) -> dict[str, Any]:
    """The outcome for a finished set, whose checksums are verified."""
    if rank > 0:
        return {"rank": rank}
    spec, about = read_manifest(folder)
    verify(folder, about)
    print(f"{folder} is finished, {spec.shards} shards are as they were; --overwrite starts anew", file=sys.stderr)
    return {"num_images": spec.num_images}


def speed(images: int, seconds: float, busy_s: float, world: int) -> dict[str, Any]:
    """Speed of this rank: images per second, and the share of the time spent in the autoencoder."""
    if not images:
        return {"images_per_second": None, "autoencoder_share": None}
    share = busy_s / seconds if busy_s else None
    busy = f", of the time {share:.1%} in the autoencoder" if share else ""
    print(f"encode: {images:,} images at {images / seconds:.1f} per second{busy}", file=sys.stderr)
    rate = round(images / seconds, 3)
    return {"processes": world, "images_per_second": rate, "autoencoder_share": share and round(share, 4)}


def announce_plan(
    work: Work, settings: EncodeSection, source: str, todo: list[int], world: int, mode: str, spoken: bool
) -> dict[str, Any]:
    """Print and return the plan of a dry run, with the time measured on one batch of at most two images."""
    spec, images = work.spec, sum(work.spec.bounds(shard)[1] for shard in todo)
    num = min(2, spec.num_images)
    work.values(work.load(0, num), 0)
    began = time.perf_counter()
    work.values(work.load(0, num), 0)
    seconds = (time.perf_counter() - began) / num * images / world
    about = work.about
    height, width = (about.get(side, about["size"]) if about["crop"] else 0 for side in ("height", "width"))
    pixels = height * width * about.get("frames", 1)
    values = settings.batch_size * spec.rows * (pixels * _WIDEST * _PASSING_VALUES)
    disk = sum(spec.shard_bytes(shard) for shard in todo)
    plan = {
        "data": f"{source}: {spec.num_images:,} images of {spec.classes:,} classes",
        "latents": f"{spec.kind} {spec.values} {spec.dtype}, scale {spec.scale:g}",
        "autoencoder": work.about["vae"] or "none: the data are latents",
        "shards": f"{spec.shards:,} of {spec.shard_images:,} images, {len(todo):,} to be made by {world} process(es)",
        "out": "a new run" if mode == "new" else "continues what is there",
    }
    return announce("encode", plan, rounded(seconds, 4 * values, disk, f"{num} images measured"), spoken)
