"""Strings of a recipe to objects: device, model, data, process."""

from __future__ import annotations

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
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import REAL_SETS, ImageSet, load_digits
from tinyfusion.data.images import read_images_npz
from tinyfusion.data.parquet import read_parquet_images
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective
from tinyfusion.processes.gaussian import GaussianObjective

PARQUET = "parquet:"  # prefix of a data set that is parquet files


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe: where to write, and how to treat what is there."""

    out: Path
    overwrite: bool = False
    dry_run: bool = False
    num_heads: int | None = None
    family: str | None = None
    command: str = ""  # as typed


def plain_recipe(recipe: Recipe, *sections: str, **inputs: Any) -> dict[str, Any]:
    """The part of a recipe that a verb depends on, with its inputs, as plain values: what "the same command" means."""
    values = to_plain(recipe)
    return {**inputs, "seed": recipe.seed, **{name: values[name] for name in sections}}


def training_plan(recipe: Recipe, settings: TrainingSection, mode: str) -> dict[str, str]:
    """What `--dry-run` says of a training run. mode: as `RunDirectory.check` gives it."""
    return {
        "training": f"{settings.steps:,} steps of {settings.batch_size} images, learning rate {settings.learning_rate:g}, {settings.dtype}",
        "data": recipe.data.name,
        "out": "a new run" if mode == "new" else "continues what is there",
    }


def objective_for(model: LoadedModel, label_drop: float) -> Objective:
    """The training objective of a model's process."""
    if model.family.process == "gaussian":
        return GaussianObjective(model.arch.num_classes, label_drop)
    raise UserError(f"no process {model.family.process!r}")


def image_set(name: str, size: int | None = None) -> ImageSet:
    """A data set by name, parquet files, or an npz of images and labels; `size` is for parquet alone.

    Raises UserError on NaN, wrong shapes, an unknown name.
    """
    if name in REAL_SETS:
        return load_digits(heldout=name.endswith(":heldout"))
    if name.startswith(PARQUET):
        return _array_set(name, *_parquet_arrays(name.removeprefix(PARQUET), size))
    if not name.endswith(".npz"):
        raise UserError(
            f"unknown data set {name!r}: there is {', '.join(REAL_SETS)}, {PARQUET}PATH, or an .npz with arr_0 and arr_1"
        )
    images, labels = read_images_npz(Path(name))
    if labels is None:
        raise UserError(f"{name} has no labels: wanted arr_1 int64 beside arr_0")
    return _array_set(name, images, labels)


@lru_cache(maxsize=2)
def _parquet_arrays(path: str, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Decoding is slow, and training, calibration and evaluation ask for the same set."""
    return read_parquet_images(Path(path), size)


def _array_set(name: str, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    """images (N, H, W, C), uint8 pixels or floats as they are."""
    x = images.astype(np.float32).transpose(0, 3, 1, 2)
    x = x / 127.5 - 1.0 if images.dtype == np.uint8 else x
    return ImageSet(name, x, labels, int(labels.max()) + 1)


def batches_for(recipe: Recipe, model: LoadedModel, device: torch.device) -> ShuffledBatches:
    """Training batches that fit `model`. Raises UserError where images and model do not go together."""
    images = image_set(recipe.data.name, recipe.data.size)
    wanted = (model.arch.in_channels, model.arch.input_size, model.arch.input_size)
    if images.x.shape[1:] != wanted:
        channels, height, width = images.x.shape[1:]
        hint = "; arr_0 looks like (N, C, H, W), wanted channels last" if (height, width, channels) == wanted else ""
        raise UserError(f"data {images.name} has images {images.x.shape[1:]}, the model takes {wanted}{hint}")
    if images.num_classes > model.arch.num_classes:
        raise UserError(
            f"data {images.name} has {images.num_classes} classes, the model knows {model.arch.num_classes}"
        )
    return ShuffledBatches(images, Randomness(recipe.seed), device, recipe.data.augment, recipe.data.flip)


def device_for(recipe: Recipe) -> torch.device:
    """The recipe's device."""
    device = choose_device(recipe.device)
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {recipe.device!r} cannot run models: use auto, cpu, cuda or mps")
    return device
