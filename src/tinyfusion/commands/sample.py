"""`sample`: a model to images, by one process or several, continuing where it was stopped.

Images are drawn in parts that lie beside the npz until all are there (`jobs/sharded_output.py`). Processes settle together what
is missing, then each draws its share, and the first one waits for the files of the others: whoever ends early is missed
by nobody, and no network stands still while a slow one draws.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
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
from tinyfusion.data.image_sink import stream_images_npz, write_png_folder
from tinyfusion.data.image_source import ImageSource, open_npz, source_of
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
from tinyfusion.jobs.sharded_output import Parts, Range, begin_parts, clear_parts, part_images, parts_folder
from tinyfusion.models.autoencoder import Autoencoder
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.training.engine import Engine

_SLOWER = 4  # how much longer than ours a part of another process may take before it is given up


@dataclass(frozen=True)
class Pictures:
    """What else is made of the images: a picture of the first ones, a folder of PNGs."""

    grid: Path | None = None
    png: Path | None = None


@dataclass(frozen=True)
class _Job:
    """One sampling. out: the npz. plain: what "the same command" means."""

    recipe: Recipe
    options: RunOptions
    model: LoadedModel
    autoencoder: Autoencoder | None
    pictures: Pictures
    plain: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.options.out

    def parts(self, num: int) -> Parts:
        """Parts of `num` images."""
        (height, width, channels), dtype = image_shape_and_dtype(self.model, self.autoencoder)
        shape = (self.recipe.sample.num_images, height, width, channels)
        return Parts(parts_folder(self.out), shape, dtype, num)


def sample(
    recipe: Recipe,
    options: RunOptions,
    model_source: str,
    grid: Path | None = None,
    png: Path | None = None,
    together: bool = False,
) -> dict[str, Any]:
    """Draw images; writes the npz at `options.out` with its record beside, and pictures if asked. Returns what `--json` prints.

    together: every process that was launched calls this, and each draws a share; else this one draws alone.
    """
    if options.out.suffix != ".npz":
        raise UserError(f"--out of sample is an .npz file; got {options.out}")
    engine = _processes(recipe) if together else Engine(device_for(recipe))
    model = open_stated(recipe, model_source, options.num_heads, options.family, options.num_classes)
    check_sampling(recipe.sample, model)
    autoencoder = autoencoder_for(recipe.sample, model)
    if autoencoder and model.facts.latent_scale is None and engine.is_main:
        numbers = f"scale {autoencoder.scale:g} and shift {autoencoder.shift:g} of {autoencoder.name}"
        print(f"note: {model_source} does not give its latents' numbers: assuming {numbers}", file=sys.stderr)
    inputs = {"model": model.hash()} | ({"autoencoder": autoencoder.hash()} if autoencoder else {})
    plain = plain_recipe(recipe, "sample", **inputs)
    job = _Job(recipe, options, model, autoencoder, Pictures(grid, png), plain)
    told = protocol(recipe, model, autoencoder)
    outcome = {"num_images": recipe.sample.num_images, "protocol": told}
    todo, num = engine.first(lambda: _check(job, engine))
    if options.dry_run:
        estimate = sampling_estimate(model, recipe.sample, sampler_of(recipe.sample, model), engine.device)
        return announce("sample", {"model": described(model), "protocol": told}, estimate, engine.is_main)
    with ExitStack() as held:
        if todo and (ran := _draw(job, job.parts(num), engine, f"sample {model_source}", held)):
            outcome["dynamic"] = ran
        if not engine.is_main:
            return {}
        if todo:
            paths = {name: str(path) if path else None for name, path in (("grid", grid), ("png", png))}
            record = stamp("sample", plain, "done", **outcome, model=model.hash(), **paths)
            parts = job.parts(num)
            _is_todo(job)  # again: what has come to be there meanwhile is not replaced
            _check_pictures(job, parts.shape[-1], parts.dtype)
            write_samples(options.out, parts.source(), labels_of(recipe, model), record)
            parts.remove()
        else:
            clear_parts(job.parts(num), plain)
            say_finished(options.out)
        _write_pictures(job, todo)
    return outcome


def _processes(recipe: Recipe) -> Engine:
    """The processes that were launched together; arithmetic stays that of one, without TF32."""
    alone = dataclasses.replace(recipe.compute, tf32=False, compile=False, gradient_accumulation_steps=1)
    return engine_for(dataclasses.replace(recipe, compute=alone))


# --------------------------------------------------------------------------------------------------------------- parts


def _check(job: _Job, engine: Engine) -> tuple[bool, int]:
    """Whether images are to be drawn, and how many in a part. Raises UserError on outputs that may not be used. Writes nothing."""
    settings, out, overwrite = job.recipe.sample, job.out, job.options.overwrite
    if settings.compile:
        check_compiler(engine.device)
    todo = _is_todo(job) or not _is_whole(out)
    share = min(settings.batch_size, math.ceil(settings.num_images / engine.world))
    num = part_images(parts_folder(out), job.plain, share, overwrite) if todo else share
    shape, dtype = job.parts(num).shape, job.parts(num).dtype
    _check_pictures(job, shape[-1], dtype)
    if todo:
        check_space(out, 2 * math.prod(shape) * dtype.itemsize)
    return todo, num


def _is_todo(job: _Job) -> bool:
    """Whether there are no images yet. Raises UserError where these or another record would be replaced that are not ours."""
    out, record = job.out, job.out.with_suffix(".json")
    check_writable(record)
    todo = file_output(out, "sample", job.plain, job.options.overwrite, _record_beside)
    if todo and not out.exists():
        file_output(record, "sample", job.plain, True, read_json)  # a record of ours may go, nothing else
    return todo


def _draw(job: _Job, parts: Parts, engine: Engine, title: str, held: ExitStack) -> dict[str, Any] | None:
    """All parts, by all processes. held: keeps their folder for this sampling. What this one ran of a model with routers."""
    missing = engine.first(lambda: _begin(job, parts, held))
    try:
        return _draw_parts(job, parts, missing, engine, title)
    except BaseException as error:
        kept = _kept(parts)
        if not kept and engine.world == 1:
            parts.remove()
        if isinstance(error, Interrupted):
            what = f"{kept:,} of {parts.shape[0]:,} images of {job.out} are kept"
            what = what if kept else f"no image of {job.out} was finished"
            raise Interrupted(error.signum, f"{what}, the same command continues") from None
        raise


def _begin(job: _Job, parts: Parts, held: ExitStack) -> list[Range]:
    """Make the folder of parts, or find it; which of them are missing. Another process may have ended since `_check`."""
    held.enter_context(begin_parts(parts, job.plain, job.options.overwrite))
    file_output(job.out, "sample", job.plain, job.options.overwrite, _record_beside)
    missing = parts.missing()
    if len(missing) < len(parts.ranges()):
        left = sum(last - first for first, last in missing)
        print(f"{job.out}: {parts.shape[0] - left:,} of {parts.shape[0]:,} images are there", file=sys.stderr)
    return missing


def _draw_parts(job: _Job, parts: Parts, missing: list[Range], engine: Engine, title: str) -> dict[str, Any] | None:
    """Draw this process's share of `missing`, every world-th part of it; the first process then waits for all others."""
    slowest = 0.0
    own = missing[engine.rank :: engine.world]
    total = sum(last - first for first, last in own)
    whose = f" (process 0 of {engine.world})" if engine.world > 1 else ""
    with progress(title + whose, total, "images", shown=engine.is_main) as bar:
        drawing = open_drawing(job.recipe, job.model, engine.device, job.autoencoder) if own else None
        done = 0
        for part in own:
            began = time.monotonic()
            assert drawing is not None
            images = []
            for batch in drawing.images(*part):
                images.append(batch)
                done += len(batch)
                bar(done)
            parts.write(part, np.concatenate(images))
            slowest = max(slowest, time.monotonic() - began)
    if engine.is_main:
        parts.wait_for(max(job.recipe.compute.timeout_s, _SLOWER * slowest))
    return drawing.skipped.report() if drawing else None


def _kept(parts: Parts) -> int:
    """Images that are there."""
    return sum(last - first for first, last in parts.ranges() if parts.is_there((first, last)))


def write_samples(out: Path, images: np.ndarray | ImageSource, labels: np.ndarray, record: dict[str, Any]) -> None:
    """The npz and the record beside it, both or neither.

    The images are ready when the record takes its place, and follow at once. A process that is killed just then leaves
    a record with the hash of images that are not there: see `_is_whole`.
    """
    source = images if isinstance(images, ImageSource) else source_of(images)
    with atomic_write(out) as beside:
        stream_images_npz(beside, source, labels)
        write_json(out.with_suffix(".json"), {**record, "image_hash": source.hash()})


def _is_whole(out: Path) -> bool:
    """Whether the images are those that the record beside them tells of."""
    try:
        told = _record_beside(out).get("image_hash")
        return told is None or told == open_npz(out).hash()
    except UserError:
        return False


def _record_beside(out: Path) -> Any:
    beside = out.with_suffix(".json")
    return read_json(beside) if beside.is_file() else None


# ------------------------------------------------------------------------------------------------------------ pictures


def _check_pictures(job: _Job, channels: int, dtype: np.dtype[np.generic]) -> None:
    """UserError where a picture would replace what these samples did not make, or cannot be made of them."""
    record = _record_beside(job.out)
    for name, path in (("grid", job.pictures.grid), ("png", job.pictures.png)):
        if path is None:
            continue
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
    """Those that were asked for and are not there, or are of former images."""
    grid, png = job.pictures.grid, job.pictures.png
    source = open_npz(job.out)
    if grid is not None and (anew or not grid.exists()):
        num = min(len(source), 64 if len(source) <= 64 else 100)
        side = source.shape[1]
        write_grid_png(grid, next(source.read(num)), 8 if num <= 64 else 10, max(1, 256 // (4 * side)))
    if png is not None and (anew or not png.is_dir() or not any(png.iterdir())):
        write_png_folder(png, source)
    record = _record_beside(job.out)
    added = {name: str(path) for name, path in (("grid", grid), ("png", png)) if path is not None}
    if isinstance(record, dict) and any(record.get(name) != path for name, path in added.items()):
        write_json(job.out.with_suffix(".json"), {**record, **added})
