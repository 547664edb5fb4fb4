"""`sample`: a model to images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.recipe import Recipe, SampleSection
from tinyfusion.core.rundir import (
    check_space,
    check_writable,
    file_output,
    read_json,
    stamp,
    write_json,
    written_beside,
)
from tinyfusion.core.signals import Interrupted
from tinyfusion.data.images import read_images_npz, write_grid_png, write_images_npz
from tinyfusion.jobs.assemble import RunOptions, device_for, plain_recipe
from tinyfusion.jobs.estimate import announce, described, sampling_estimate
from tinyfusion.jobs.evaluate import image_hash
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.sample.drive import SamplerSettings, image_labels, to_uint8
from tinyfusion.sample.drive import sample as draw_samples


def sample(recipe: Recipe, options: RunOptions, model_source: str, grid: Path | None = None) -> dict[str, Any]:
    """Draw images; writes the npz at `options.out` with its record beside, and a picture grid if asked. Returns what `--json` prints."""
    settings, out = recipe.sample, options.out
    if out.suffix != ".npz":
        raise UserError(f"--out of sample is an .npz file; got {out}")
    model = open_model(model_source, settings.weights, options.num_heads, options.family)
    plain = plain_recipe(recipe, "sample", model=model.hash())
    check_sampling(settings, model)
    todo = file_output(out, "sample", plain, options.overwrite, _record_beside) or not _is_whole(out)
    if todo and not out.exists():
        file_output(out.with_suffix(".json"), "sample", plain, True, read_json)  # a record of ours may go, nothing else
    check_grid(grid, out)
    device = device_for(recipe)
    side, channels = model.arch.input_size, model.arch.in_channels
    check_space(out, settings.num_images * side * side * channels * 2)
    outcome = {"num_images": settings.num_images, "protocol": protocol(recipe, model)}
    if options.dry_run:
        estimate = sampling_estimate(model, settings, sampler_of(settings), device)
        return announce("sample", {"model": described(model), "protocol": outcome["protocol"]}, estimate)
    if todo:
        try:
            images, labels = draw(recipe, model, f"sample {model_source}")
        except Interrupted as error:
            raise Interrupted(error.signum, f"no image of {out} was kept, the same command draws them anew") from None
        record = stamp("sample", plain, "done", **outcome, model=model.hash(), grid=str(grid) if grid else None)
        write_samples(out, images, labels, record)
    else:
        print(f"{out} is finished; --overwrite starts anew", file=sys.stderr)
    if grid is not None and (todo or not grid.exists()):
        images = read_images_npz(out)[0]
        columns = 8 if len(images) <= 64 else 10
        write_grid_png(grid, images[: columns * columns], columns, max(1, 256 // (4 * side)))
    return outcome


def write_samples(out: Path, images: np.ndarray, labels: np.ndarray, record: dict[str, Any]) -> None:
    """The npz and the record beside it, both or neither.

    The images are ready when the record takes its place, and follow at once. A process that is killed just then leaves
    a record with the hash of images that are not there: see `_is_whole`.
    """
    with written_beside(out) as beside:
        write_images_npz(beside, images, labels)
        write_json(out.with_suffix(".json"), {**record, "image_hash": image_hash(images)})


def _is_whole(out: Path) -> bool:
    """Whether the images are those that the record beside them tells of."""
    try:
        told = _record_beside(out).get("image_hash")
        return told is None or told == image_hash(read_images_npz(out)[0])
    except UserError:
        return False


def check_grid(grid: Path | None, out: Path) -> None:
    """UserError where the picture would replace a file that these samples did not make, or cannot be written."""
    if grid is None:
        return
    if grid.suffix != ".png":
        raise UserError(f"--grid is a .png file; got {grid}")
    check_writable(grid)
    record = _record_beside(out)
    ours = isinstance(record, dict) and record.get("grid") == str(grid)
    if grid.exists() and not ours:
        raise UserError(f"--grid {grid} exists and does not belong to {out}; choose another name")


def draw(recipe: Recipe, model: LoadedModel, title: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, S, S, C) and labels (N,)."""
    settings = recipe.sample
    labels = labels_of(recipe, model)
    model.module.to(device_for(recipe)).eval()
    images: list[np.ndarray] = []
    with progress(title, len(labels), "images") as bar:
        for batch in draw_samples(model, labels, sampler_of(settings), recipe.seed, settings.batch_size):
            if not bool(torch.isfinite(batch.x).all()):
                raise UserError(
                    f"the model drew values that are not finite from image {batch.first} on: it is broken or unrecovered"
                )
            images.append(to_uint8(batch.x))
            bar(batch.first + len(batch.x))
    return np.concatenate(images), labels


def labels_of(recipe: Recipe, model: LoadedModel) -> np.ndarray:
    """The label of every image."""
    settings = recipe.sample
    return image_labels(
        settings.num_images, model.arch.num_classes, recipe.seed, settings.labels, settings.label_rule == "balanced"
    )


def sampler_of(settings: SampleSection) -> SamplerSettings:
    """The sampler's settings. Raises UserError on a guidance or a number of steps that cannot be."""
    if settings.guidance < 1:
        raise UserError(
            f"--guidance must be at least 1 (1 runs the conditional model alone); got {settings.guidance:g}"
        )
    try:
        return SamplerSettings(
            settings.sampler,
            settings.num_steps,
            settings.guidance,
            settings.guidance_channels,
            settings.eta,
            settings.clip,
        )
    except ValueError as error:
        raise UserError(f"--num-steps {settings.num_steps} with --sampler {settings.sampler}: {error}") from error


def protocol(recipe: Recipe, model: LoadedModel) -> str:
    """The sampling half of the protocol string."""
    s = recipe.sample
    eta = f" eta {s.eta:g}" if s.sampler == "ddim" and s.eta else ""
    labels = "labels " + ("given" if s.labels else s.label_rule)
    channels = sampler_of(s).guided_channels(model)
    guidance = f"guidance {s.guidance:g} on {channels} channel{'s' * (channels > 1)} ({s.guidance_channels})"
    sampler = f"{s.sampler} {s.num_steps} steps{eta}{' clipped' if s.clip else ''}"
    return f"{s.num_images} images | {sampler} | {guidance} | {labels} | float32 | seed {recipe.seed}"


def _record_beside(out: Path) -> Any:
    beside = out.with_suffix(".json")
    return read_json(beside) if beside.is_file() else None


def check_sampling(settings: SampleSection, model: LoadedModel) -> None:
    """UserError on settings that cannot work with the model."""
    if settings.num_images < 1 or settings.batch_size < 1:
        raise UserError(
            f"sample wants at least one image and a batch of at least one; got {settings.num_images} and {settings.batch_size}"
        )
    outside = [label for label in settings.labels if not 0 <= label < model.arch.num_classes]
    if outside:
        raise UserError(f"--labels {outside} out of range: the model knows classes 0 to {model.arch.num_classes - 1}")
    sampler_of(settings)
    if model.facts.latent_scale is not None:
        raise UserError(
            "this model draws latents, and decoding them with a VAE is not built yet: pixel-space models can be sampled"
        )
