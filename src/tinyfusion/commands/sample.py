"""`sample`: draw images from a model with one process or several, and continue an interrupted job.

Images are drawn in shards next to the npz (`jobs/sharded_output.py`). Rank 0 determines the missing shards, each rank draws
every world-th of them, and rank 0 joins the files (`core/ranks.py`).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.records import read_record
from tinyfusion.core.rundir import (
    atomic_write,
    check_space,
    check_writable,
    file_output,
    read_json,
    say_finished,
    stamp,
    write_json,
)
from tinyfusion.core.signals import Interrupted
from tinyfusion.data.image_source import ImageSource, open_npz, source_of, stream_images_npz, write_png_folder
from tinyfusion.data.images import write_grid_png
from tinyfusion.jobs.assemble import RunOptions, device_for, engine_for, plain_recipe
from tinyfusion.jobs.estimate import announce, described, sampling_estimate
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import (
    autoencoder_for,
    check_sampling,
    image_shape_and_dtype,
    labels_of,
    open_drawing,
    protocol,
)
from tinyfusion.jobs.sharded_output import ImageShards, Range, clear_shards, shard_images, shards_folder, writing_shards
from tinyfusion.models.autoencoder import Autoencoder
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.training.engine import Engine

_SLOWER = 4  # times the longest drawing of a shard on rank 0 that a shard of another rank may take


@dataclass(frozen=True)
class _Job:
    """pictures: by option, a grid of the first images and a folder of PNGs. plain: what identifies the same command."""

    recipe: Recipe
    options: RunOptions
    model: LoadedModel
    autoencoder: Autoencoder | None
    pictures: Mapping[str, Path]
    plain: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.options.out

    def shards(self, num: int) -> ImageShards:
        (height, width, channels), dtype = image_shape_and_dtype(self.model, self.autoencoder)
        shape = (self.recipe.sample.num_images, height, width, channels)
        return ImageShards(shards_folder(self.out), shape, dtype, num)


def sample(
    recipe: Recipe, options: RunOptions, model_source: str, grid: Path | None = None, png: Path | None = None,
    together: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Draw images: write the npz at `options.out` and its record, and optional pictures. Returns the outcome for `--json`.

    together: all launched processes call this, and each draws a share; else this process draws alone.
    """
    if options.out.suffix != ".npz":
        raise UserError(f"--out of sample is an .npz file; got {options.out}")
    # the arithmetic of a single process: no TF32
    alone = dataclasses.replace(recipe.compute, tf32=False, compile=False, gradient_accumulation_steps=1)
    engine = engine_for(dataclasses.replace(recipe, compute=alone)) if together else Engine(device_for(recipe))
    model = open_stated(recipe, model_source, options.num_heads, options.family, options.num_classes)
    check_sampling(recipe.sample, model)
    autoencoder = autoencoder_for(recipe.sample, model)
    if autoencoder and model.facts.latent_scale is None and engine.is_main:
        numbers = f"scale {autoencoder.scale:g} and shift {autoencoder.shift:g} of {autoencoder.name}"
        print(f"note: {model_source} does not give its latents' numbers: assuming {numbers}", file=sys.stderr)
    inputs = {"model": model.hash()} | ({"autoencoder": autoencoder.hash()} if autoencoder else {})
    plain = plain_recipe(recipe, "sample", **inputs)
    pictures = {name: path for name, path in (("grid", grid), ("png", png)) if path is not None}
    job = _Job(recipe, options, model, autoencoder, pictures, plain)
    conditions = protocol(recipe, model, autoencoder)
    outcome = {"num_images": recipe.sample.num_images, "protocol": conditions}
    todo, num = engine.first(lambda: _check(job, engine))
    if options.dry_run:
        estimate = sampling_estimate(model, recipe.sample, sampler_of(recipe.sample, model), engine.device)
        return announce("sample", {"model": described(model), "protocol": conditions}, estimate, engine.is_main)
    shards = job.shards(num)
    with ExitStack() as contexts:
        if todo and (skipping := _draw(job, shards, engine, f"sample {model_source}", contexts)):
            outcome["dynamic"] = skipping
        if not engine.is_main:
            return {}
        if todo:
            paths = {name: str(pictures[name]) if name in pictures else None for name in ("grid", "png")}
            record = stamp("sample", plain, "done", **outcome, model=model.hash(), **paths)
            _is_todo(job)  # again: an output of another job that appeared meanwhile is not replaced
            _check_pictures(job, shards.shape[-1], shards.dtype)
            write_samples(options.out, shards.source(), labels_of(recipe, model), record)
            shards.remove()
        else:
            clear_shards(shards, plain)
            say_finished(options.out)
        _write_pictures(job, todo)
    return outcome


# -------------------------------------------------------------------------------------------------------------- shards


def _check(job: _Job, engine: Engine) -> tuple[bool, int]:
    """Whether images are to be drawn, and the images of a shard. Raises UserError on unusable outputs."""
    settings, out = job.recipe.sample, job.out
    if settings.compile:
        check_compiler(engine.device)
    todo = _is_todo(job) or not _is_whole(out)
    share = min(settings.batch_size, math.ceil(settings.num_images / engine.world))
    num = shard_images(shards_folder(out), job.plain, share, job.options.overwrite) if todo else share
    shards = job.shards(num)
    _check_pictures(job, shards.shape[-1], shards.dtype)
    if todo:
        check_space(out, 2 * math.prod(shards.shape) * shards.dtype.itemsize)
    return todo, num


def _is_todo(job: _Job) -> bool:
    """Whether there are no images yet. Raises UserError where a file of others would be replaced."""
    out, record = job.out, job.out.with_suffix(".json")
    check_writable(record)
    todo = file_output(out, "sample", job.plain, job.options.overwrite, _record_of)
    if todo and not out.exists():
        file_output(record, "sample", job.plain, True, read_json)  # only a record of ours may be replaced
    return todo


def _draw(job: _Job, shards: ImageShards, engine: Engine, title: str, contexts: ExitStack) -> dict[str, Any] | None:
    """Draw all missing shards on all ranks. Returns the report of a model with routers. contexts: locks the folder of shards."""

    def begin() -> list[Range]:
        """Create or reopen the folder of shards. Returns the missing ones."""
        contexts.enter_context(writing_shards(shards, job.plain, job.options.overwrite))
        # another process may have finished since `_check`
        file_output(job.out, "sample", job.plain, job.options.overwrite, _record_of)
        if num := shards.num_drawn():
            print(f"{job.out}: {num:,} of {shards.shape[0]:,} images are there", file=sys.stderr)
        return shards.missing()

    missing = engine.first(begin)
    try:
        return _draw_shards(job, shards, missing, engine, title)
    except BaseException as error:
        num = shards.num_drawn()
        if not num and engine.world == 1:
            shards.remove()
        if isinstance(error, Interrupted):
            what = f"{num:,} of {shards.shape[0]:,} images of {job.out} are saved"
            what = what if num else f"no image of {job.out} was finished"
            raise Interrupted(error.signum, f"{what}, the same command continues") from None
        raise


def _draw_shards(
    job: _Job, shards: ImageShards, missing: list[Range], engine: Engine, title: str
) -> dict[str, Any] | None:
    """Draw every world-th of the `missing` shards; rank 0 then waits for the other ranks."""
    slowest = 0.0
    own = missing[engine.rank :: engine.world]
    total = sum(last - first for first, last in own)
    title += f" (process 0 of {engine.world})" if engine.world > 1 else ""
    with progress(title, total, "images", shown=engine.is_main) as bar:
        drawing = open_drawing(job.recipe, job.model, engine.device, job.autoencoder) if own else None
        done = 0
        for shard in own:
            began = time.monotonic()
            assert drawing is not None
            images = []
            for batch in drawing.images(*shard):
                images.append(batch)
                done += len(batch)
                bar(done)
            shards.write(shard, np.concatenate(images))
            slowest = max(slowest, time.monotonic() - began)
    if engine.is_main:
        shards.wait_for(missing, engine.world, max(job.recipe.compute.timeout_s, _SLOWER * slowest))
    return drawing.skipped.report() if drawing else None


def write_samples(out: Path, images: np.ndarray | ImageSource, labels: np.ndarray, record: dict[str, Any]) -> None:
    """Write the npz and its record (.json), both or neither.

    The record gets its name just before the images. A process that is killed in between leaves a record with the hash of
    images that do not exist: see `_is_whole`.
    """
    source = images if isinstance(images, ImageSource) else source_of(images)
    with atomic_write(out) as temporary:
        stream_images_npz(temporary, source, labels)
        write_json(out.with_suffix(".json"), {**record, "image_hash": source.hash()})


def _is_whole(out: Path) -> bool:
    """Whether the images have the hash in their record."""
    try:
        recorded = _record_of(out).get("image_hash")
        return recorded is None or recorded == open_npz(out).hash()
    except UserError:
        return False


def _record_of(out: Path) -> Any:
    """The record of an npz; None where it has none."""
    return read_record(out.with_suffix(".json"))


# ------------------------------------------------------------------------------------------------------------ pictures


def _check_pictures(job: _Job, channels: int, dtype: np.dtype[np.generic]) -> None:
    """Raise UserError where a picture would replace a file of others, or cannot show these images."""
    record = _record_of(job.out)
    for name, path in job.pictures.items():
        if dtype != np.uint8 or channels not in (1, 3):
            what = "latents" if dtype != np.uint8 else f"images of {channels} channels"
            raise UserError(f"--{name} shows images of 1 or 3 channels, and these are {what}: leave it out")
        if name == "grid" and path.suffix != ".png":
            raise UserError(f"--grid is a .png file; got {path}")
        if name == "png" and (path.is_file() or path.suffix in (".png", ".npz")):
            raise UserError(f"--png is a folder, for one file per image; got {path}")
        check_writable(path)
        ours = isinstance(record, dict) and record.get(name) == str(path)
        if path.exists() and not ours and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"--{name} {path} exists and does not belong to {job.out}; choose another name")


def _write_pictures(job: _Job, anew: bool) -> None:
    """Write the requested pictures that are missing; all of them where the images are new."""
    grid, png = job.pictures.get("grid"), job.pictures.get("png")
    source = open_npz(job.out)
    if grid is not None and (anew or not grid.exists()):
        num, columns = (100, 10) if len(source) > 64 else (len(source), 8)
        num = min(num, len(source))
        write_grid_png(grid, next(source.read(num)), columns, max(1, 256 // (4 * source.shape[1])))
    if png is not None and (anew or not png.is_dir() or not any(png.iterdir())):
        write_png_folder(png, source)
    record = _record_of(job.out)
    added = {name: str(path) for name, path in job.pictures.items()}
    if isinstance(record, dict) and any(record.get(name) != path for name, path in added.items()):
        write_json(job.out.with_suffix(".json"), {**record, **added})
