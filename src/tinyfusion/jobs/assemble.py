"""Strings of a recipe to objects: device, model, data, process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfusion.core.config import to_plain
from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Recipe, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import Batches, ShuffledBatches, signed
from tinyfusion.data.digits import REAL_SETS, ImageSet, load_digits
from tinyfusion.data.images import read_images_npz
from tinyfusion.data.latents import LATENTS, LatentBatches, open_latents
from tinyfusion.data.originals import read_originals
from tinyfusion.data.parquet import HUB, HUB_STREAM, PARQUET, PARQUET_STREAM, STREAMED, WHOLE, read_parquet_images
from tinyfusion.data.published_latents import PUBLISHED_FACTOR
from tinyfusion.data.stream import StreamedBatches, open_parts
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.training.engine import Engine, open_engine


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe: where to write, and how to treat what is there."""

    out: Path
    overwrite: bool = False
    dry_run: bool = False
    num_heads: int | None = None
    family: str | None = None
    num_classes: int | None = None
    command: str = ""  # as typed
    resume: Path | None = None  # a checkpoint to go on from, instead of the newest


def open_teacher(
    recipe: Recipe, num_heads: int | None, family: str | None, on_data: bool = True, num_classes: int | None = None
) -> LoadedModel:
    """The model that the recipe starts from. family: as typed, which goes before what the recipe says.

    on_data: images will be wanted, and a name that cannot be a data set is refused before anything is fetched.
    """
    if on_data:
        check_data_name(recipe.data.name)
    return open_model(recipe.teacher, recipe.sample.weights, num_heads, family or recipe.teacher_family, num_classes)


def plain_recipe(recipe: Recipe, *sections: str, **inputs: Any) -> dict[str, Any]:
    """The part of a recipe that a verb depends on, with its inputs, as plain values: what "the same command" means."""
    values = to_plain(recipe)
    return {**inputs, "seed": recipe.seed, **{name: values[name] for name in sections}}


def job_record(recipe: Recipe, options: RunOptions, **paths: Any) -> dict[str, Any]:
    """What a run's record keeps so that its training can be put together again; paths: of models that were opened."""
    return {
        "recipe": to_plain(recipe),
        **{name: getattr(options, name) for name in ("num_heads", "family", "num_classes")},
        **paths,
    }


def training_plan(recipe: Recipe, settings: TrainingSection, mode: str) -> dict[str, str]:
    """What `--dry-run` says of a training run. mode: as `RunDirectory.check` gives it."""
    return {
        "training": f"{settings.steps:,} steps of {settings.batch_size} images, learning rate {settings.learning_rate:g}, {settings.dtype}",
        "data": recipe.data.name,
        "out": "a new run" if mode == "new" else "continues what is there",
    }


def image_set(name: str, size: int | None = None) -> ImageSet:
    """A data set by name, parquet files, one of the hub, a folder of classes, or an npz of images and labels; no `size` is for npz.

    Raises UserError on NaN, wrong shapes, an unknown name, and a set that is only to be read in parts.
    """
    if name in REAL_SETS:
        return load_digits(heldout=name.endswith(":heldout"))
    if name.startswith(WHOLE) or Path(name).is_dir():
        return _array_set(name, *_pictures(name, size))
    if name.startswith(LATENTS):
        raise UserError(
            f"{name} are latents, and here images have to be in memory: name the pictures they were made of"
        )
    if name.startswith(STREAMED):
        raise UserError(
            f"{name} is read in parts, and here a whole set has to be in memory: give {PARQUET}PATH or {HUB}ORG/NAME, of a part "
            "where it is large"
        )
    check_data_name(name)
    images, labels = read_images_npz(Path(name))
    if labels is None:
        raise UserError(f"{name} has no labels: wanted arr_1 int64 beside arr_0")
    return _array_set(name, images, labels)


def check_data_name(name: str) -> None:
    """UserError on what names no data set: said before a teacher is fetched that there are no images for."""
    if name.endswith(".npz") and not Path(name).is_file():
        raise UserError(f"no images at {name}: no such file")
    known = name in REAL_SETS or name.startswith((*WHOLE, *STREAMED, LATENTS)) or name.endswith(".npz")
    if not known and not Path(name).is_dir():
        raise UserError(
            f"unknown data set {name!r}: there is {', '.join(REAL_SETS)}, {PARQUET}PATH, {HUB}ORG/NAME, {PARQUET_STREAM}PATH, "
            f"{HUB_STREAM}ORG/NAME, {LATENTS}PATH, a folder of classes, or an .npz with arr_0 and arr_1"
        )


@lru_cache(maxsize=2)
def _pictures(name: str, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Decoding is slow, and training, calibration and evaluation ask for the same set."""
    return read_parquet_images(name, size) if name.startswith(WHOLE) else read_originals(name, size)


def _array_set(name: str, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """images (N, H, W, C), uint8 pixels or floats as they are."""
    return ImageSet(name, signed(images), labels, int(labels.max()) + 1)


def batches_for(recipe: Recipe, model: LoadedModel, device: torch.device) -> Batches:
    """Training batches that fit `model`. Raises UserError where images and model do not go together."""
    data, randomness = recipe.data, Randomness(recipe.seed)
    if data.name.startswith(STREAMED):
        parts = open_parts(data.name, data.size, model.arch.in_channels)
        _check_fit(data.name, parts.shape, parts.classes, model)
        timeout_s = recipe.compute.timeout_s
        return StreamedBatches(parts, randomness, device, data.window_images, data.augment, data.flip, timeout_s)
    if data.name.startswith(LATENTS):
        return _latent_batches(recipe, model, device)
    images = image_set(data.name, data.size)
    _check_fit(images.name, images.x.shape[1:], images.num_classes, model)
    return ShuffledBatches(images, randomness, device, data.augment, data.flip)


def _latent_batches(recipe: Recipe, model: LoadedModel, device: torch.device) -> LatentBatches:
    """Batches of what `encode` made. Raises UserError where it was scaled otherwise than the model wants it."""
    data, latents = recipe.data, open_latents(Path(recipe.data.name.removeprefix(LATENTS)))
    _check_fit(data.name, latents.spec.shape, latents.spec.classes, model)
    if data.augment:
        raise UserError(
            f"data.augment is {data.augment:g}, and {data.name} are latents, which cannot be turned or scaled"
        )
    wanted = model.facts.latent_scale
    if wanted is not None and abs(wanted - latents.spec.scale) > 1e-6 * wanted:
        raise UserError(
            f"{data.name} was made for the scale {latents.spec.scale:g}, the model was trained with {wanted:g}"
        )
    return LatentBatches(latents, Randomness(recipe.seed), device, data.flip)


def trained_on(model: LoadedModel, source: Batches) -> LoadedModel:
    """A new model with the facts of its data: of latents their scale, their autoencoder and the side of their pictures."""
    if not isinstance(source, LatentBatches):
        return model
    spec, about = source.latents.spec, source.latents.about
    side = about.get("size") or PUBLISHED_FACTOR * spec.shape[-1]
    facts = dataclasses.replace(model.facts, image_size=side, latent_scale=spec.scale, vae=about.get("vae"))
    return dataclasses.replace(model, facts=facts)


def _check_fit(name: str, shape: tuple[int, ...], classes: int, model: LoadedModel) -> None:
    """shape: (C, H, W) of the images."""
    wanted = (model.arch.in_channels, model.arch.input_size, model.arch.input_size)
    if shape != wanted:
        channels, height, width = shape
        hint = "; arr_0 looks like (N, C, H, W), wanted channels last" if (height, width, channels) == wanted else ""
        raise UserError(f"data {name} has images {shape}, the model takes {wanted}{hint}")
    if classes > model.arch.num_classes:
        raise UserError(f"data {name} has {classes} classes, the model knows {model.arch.num_classes}")


def engine_for(recipe: Recipe) -> Engine:
    """The processes of a training, and the device of this one."""
    device_for(recipe)
    return open_engine(recipe.device, recipe.compute)


def device_for(recipe: Recipe) -> torch.device:
    """The recipe's device."""
    device = choose_device(recipe.device)
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {recipe.device!r} cannot run models: use auto, cpu, cuda or mps")
    return device
