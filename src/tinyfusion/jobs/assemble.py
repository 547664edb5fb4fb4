"""Objects of the strings in a recipe: device, model, data."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfusion.config.loading import to_plain
from tinyfusion.config.recipe import DataSection, ModelSection, Orientation, Recipe, TrainingSection
from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.launch import launched_local_rank, launched_processes
from tinyfusion.core.progress import say
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import LOOKED_AT, Batches, ShuffledBatches, scale_remarks, signed
from tinyfusion.data.buckets import BucketBatches, is_bucketed, open_buckets
from tinyfusion.data.digits import REAL_SETS, ImageSet, load_digits
from tinyfusion.data.images import read_images_npz
from tinyfusion.data.latents import LATENTS, LatentBatches, open_latents
from tinyfusion.data.originals import Pictures, read_originals
from tinyfusion.data.parquet import HUB, HUB_STREAM, PARQUET, PARQUET_STREAM, STREAMED, WHOLE
from tinyfusion.data.stream import StreamedBatches, open_shards
from tinyfusion.jobs.latent_facts import check_latents, open_stated, prompts_file, prompts_hash, with_latents
from tinyfusion.jobs.origins import require_data
from tinyfusion.jobs.transformer_training import transformer_batches
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.places import is_shipped
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.training.engine import Engine, open_engine

_MOST_CLASSES = 100_000  # of a new model that are taken from its data: a larger label is more likely a mistake


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line that are no part of a recipe."""

    out: Path
    overwrite: bool = False
    dry_run: bool = False
    num_heads: int | None = None
    family: str | None = None
    num_classes: int | None = None
    command: str = ""  # as typed
    resume: Path | None = None  # a checkpoint to continue from, instead of the newest
    blocks: Path | None = None  # rows of transformer classes of diffusers that the shipped table lacks
    inputs: Path | None = None  # recorded calls of a transformer of diffusers, which criteria look at


def open_teacher(
    recipe: Recipe, num_heads: int | None, family: str | None, on_data: bool = True, num_classes: int | None = None,
    blocks: Path | None = None,
) -> LoadedModel:  # fmt: skip
    """The model that the recipe starts from. family: overrides that of the recipe. blocks: rows of the user.

    on_data: refuse a name that cannot be a data set before anything is fetched.
    """
    if on_data and recipe.data.name:
        check_data_name(recipe.data.name)
    return open_stated(recipe, recipe.teacher, num_heads, family or recipe.teacher_family, num_classes, blocks)


def other_inputs(teacher: LoadedModel, model: LoadedModel, *further: str) -> str | None:
    """Why a teacher does not take the images and classes of a model; None if it does. further: sizes that must be equal as well."""
    if teacher.family.name != model.family.name:
        return f"it is of family {teacher.family.name}"
    sizes = ("in_channels", "input_size", *further, "num_classes")
    differ = [n for n in sizes if getattr(teacher.arch, n, None) != getattr(model.arch, n, None)]
    return f"its {differ[0]} differs" if differ else None


def plain_recipe(recipe: Recipe, *sections: str, **inputs: Any) -> dict[str, Any]:
    """The sections of a recipe that a verb depends on, with its inputs, as plain values: they identify the same command."""
    values, inputs = to_plain(recipe), {**inputs, **prompts_hash(recipe.data)}
    if recipe.destination is not None and {*sections} & {"prune", "train"}:
        inputs["destination"] = recipe.destination
    return {**inputs, "seed": recipe.seed, **{name: values[name] for name in sections}}


def job_record(recipe: Recipe, options: RunOptions, **paths: Any) -> dict[str, Any]:
    """The part of a run's record from which its training can be repeated. paths: of the models."""
    named = {name: str(path) if is_shipped(path) else _absolute(str(path)) for name, path in paths.items() if path}
    data = recipe.data.name if recipe.data.name in REAL_SETS else _absolute(recipe.data.name)
    typed = {name: getattr(options, name) for name in ("num_heads", "family", "num_classes")}
    plain = to_plain(recipe)
    plain["data"]["prompts"] = _absolute(recipe.data.prompts)
    return {"recipe": plain, "data": data, **typed, **named}


def _absolute(name: str) -> str:
    """A name, with the absolute path where it is a path: a later command may run in another folder."""
    prefix = next((prefix for prefix in (LATENTS, PARQUET, PARQUET_STREAM) if name.startswith(prefix)), "")
    path = Path(name.removeprefix(prefix))
    return f"{prefix}{path.absolute()}" if name and path.exists() else name


def training_plan(recipe: Recipe, settings: TrainingSection | None, mode: str) -> dict[str, str]:
    """Rows of `--dry-run` about a run. settings: of its training, if any; mode: of `RunDirectory.check`."""
    out = {"out": "a new run" if mode == "new" else "continues what is there"}
    if settings is None:
        return out
    steps = f"{settings.steps:,} steps of {settings.batch_size} images, learning rate {settings.learning_rate:g}"
    return {"training": f"{steps}, {settings.dtype}", "data": recipe.data.name, **out}


def image_set(name: str, size: int | None = None, orientation: Orientation = "follow") -> ImageSet:
    """A data set by name, parquet files, one of the hub, a folder of pictures, or an npz of images and labels.

    size, orientation: of pictures, as in `decode`; an npz stays as it is. Raises UserError on an unknown name, NaN, wrong
    shapes, and a set that can only be streamed.
    """
    if name in REAL_SETS:
        return load_digits(heldout=name.endswith(":heldout"))
    if name.startswith(WHOLE) or Path(name).is_dir():
        encoded = pictures(name, size, orientation)
        return _array_set(name, encoded.pixels, encoded.labels)
    if name.startswith(LATENTS):
        raise UserError(
            f"{name} are latents, and here images have to be in memory: name the pictures they were made of"
        )
    if name.startswith(STREAMED):
        raise UserError(
            f"{name} is streamed, and here a whole set has to be in memory: give {PARQUET}PATH or {HUB}ORG/NAME, a part of it "
            "where it is large"
        )
    check_data_name(name)
    images, labels = read_images_npz(Path(name))
    if labels is None:
        raise UserError(f"{name} has no labels: wanted arr_1 int64 and arr_0")
    if images.shape[-1] > 3:
        some, num = _array_set(name, images[:LOOKED_AT], labels), images.shape[-1]
        pixels = f"{name}: arr_0 is uint8 with {num} channels, taken as pixels; latents are stored as floats"
        say([pixels] if images.dtype == np.uint8 else scale_remarks(torch.from_numpy(some.x), name))
    return _array_set(name, images, labels)


def check_data_name(name: str) -> None:
    """Raise UserError where `name` is no data set."""
    if name.endswith(".npz") and not Path(name).is_file():
        raise UserError(f"no images at {name}: no such file")
    known = name in REAL_SETS or name.startswith((*WHOLE, *STREAMED, LATENTS)) or name.endswith(".npz")
    if not known and not Path(name).is_dir():
        folders = [entry.name for entry in Path().iterdir() if entry.is_dir()] if len(Path(name).parts) == 1 else []
        close = difflib.get_close_matches(name, folders, n=1)
        raise UserError(
            f"unknown data set {name!r}{f', and no folder of that name; did you mean {close[0]!r}?' if close else ''}: "
            f"there is {', '.join(REAL_SETS)}, {PARQUET}PATH, {HUB}ORG/NAME, {PARQUET_STREAM}PATH, "
            f"{HUB_STREAM}ORG/NAME, {LATENTS}PATH, a folder of pictures, or an .npz with arr_0 and arr_1"
        )


def is_pictures(name: str) -> bool:
    """Whether a data set is of encoded pictures, to which `data.size` and `data.orientation` apply."""
    return name not in ("", *REAL_SETS) and (name.startswith((*WHOLE, *STREAMED)) or Path(name).is_dir())


def pictures(name: str, size: int | None, orientation: Orientation) -> Pictures:
    """A set of pictures in memory, decoded once. Its remarks are printed where it is decoded."""
    return _decoded_once(name, size, orientation, _state_of_files(Path(name.removeprefix(PARQUET))))


def _state_of_files(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Absolute path, size and time of change of the file `path`, or of all files below it."""
    inside = (os.path.join(folder, name) for folder, _folders, names in os.walk(path) for name in names)
    states = []
    for file in [path] if path.is_file() else inside:
        with contextlib.suppress(OSError):  # gone, or a link to nothing: the reader says so
            status = os.stat(file)
            states.append((os.path.abspath(file), status.st_size, status.st_mtime_ns))
    return tuple(sorted(states))


@lru_cache(maxsize=2)
def _decoded_once(name: str, size: int | None, orientation: Orientation, _files: object) -> Pictures:
    """Decoding is slow, and training, calibration and evaluation read the same set. _files: their state."""
    decoded = read_originals(name, size, orientation)
    say(decoded.remarks)
    return decoded


def _array_set(name: str, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    return ImageSet(name, signed(images), labels, int(labels.max()) + 1)


def batches_for(recipe: Recipe, model: LoadedModel, device: torch.device) -> Batches:
    """Training batches that fit `model`. Raises UserError where images and model do not go together."""
    source = open_batches(recipe, device, getattr(model.arch, "in_channels", None))
    if isinstance(model, TransformerModel):
        return transformer_batches(recipe, model, source)
    table = model.conditions
    _check_fit(recipe.data, source, model.arch, len(table))
    if isinstance(source, LatentBatches | BucketBatches):
        check_latents(model, recipe.data.name, source.latents.spec)
    return source.conditioned_on(table)


def open_batches(recipe: Recipe, device: torch.device, channels: int | None) -> Batches:
    """Training batches of the recipe's data. channels: of the model; 3 converts grey pictures to colour."""
    data, randomness = require_data(recipe).data, Randomness(recipe.seed)
    if data.name.startswith(STREAMED):
        shards = open_shards(data.name, data.size, channels, data.orientation)
        timeout_s = recipe.compute.timeout_s
        return StreamedBatches(shards, randomness, device, data.window_images, data.augment, data.flip, timeout_s)
    if data.name.startswith(LATENTS):
        if data.augment:
            raise UserError(
                f"data.augment is {data.augment:g}, and {data.name} are latents, which cannot be turned or scaled"
            )
        folder = Path(data.name.removeprefix(LATENTS))
        latents: LatentBatches | BucketBatches
        if is_bucketed(folder):
            latents = BucketBatches(open_buckets(folder), randomness, device, data.flip)
        else:
            latents = LatentBatches(open_latents(folder), randomness, device, data.flip)
        say(scale_remarks(latents.rows(0, min(len(latents), LOOKED_AT))[0], data.name))
        return latents
    images = image_set(data.name, data.size, data.orientation)
    if is_pictures(data.name) and (channels, images.x.shape[1]) == (3, 1):
        images = dataclasses.replace(images, x=images.x.repeat(3, 1))
    return ShuffledBatches(images, randomness, device, data.augment, data.flip)


def sized(recipe: Recipe, source: Batches) -> Recipe:
    """The recipe of a new model, with missing sizes taken from its data. Raises UserError where the others do not fit them."""
    _check_images(recipe.data, source)
    channels, height, _width = source.shape
    if recipe.model.num_classes is None and source.classes > _MOST_CLASSES and prompts_file(recipe.data) is None:
        raise UserError(
            f"data {recipe.data.name} has the label {source.classes - 1}: where it really has so many classes, say "
            f"--set model.num_classes={source.classes}"
        )
    given, sizes = recipe.model, {"input_size": height, "in_channels": channels, "num_classes": source.classes}
    missing = {name: size for name, size in sizes.items() if getattr(given, name) is None}
    model = dataclasses.replace(given, **missing)  # type: ignore[arg-type]  # all are whole numbers
    _check_fit(recipe.data, source, model, model.num_classes or source.classes)
    if given.input_size is None and height % model.patch_size:
        below = height - height % model.patch_size
        crop = f"--set data.size={below} or " if below and is_pictures(recipe.data.name) else ""
        patch = next(n for n in range(2, height + 1) if height % n == 0) if height > 1 else 1
        raise UserError(
            f"data {recipe.data.name} has images of {height} x {height}, no multiple of model.patch_size={model.patch_size}: "
            f"{crop}--set model.patch_size={patch}"
        )
    return dataclasses.replace(recipe, model=model)


def trained_on(model: LoadedModel, source: Batches) -> LoadedModel:
    """A new model with the facts of its latents."""
    if not isinstance(source, LatentBatches | BucketBatches):
        return model
    return with_latents(model, source.latents.spec, source.latents.about)


def _check_fit(data: DataSection, source: Batches, sizes: Any, labels: int) -> None:
    """Raise UserError where data do not fit a model. sizes: its arch, or the section of a new one; labels: number that it knows."""
    _check_images(data, source)
    wanted, new = (sizes.in_channels, sizes.input_size, sizes.input_size), isinstance(sizes, ModelSection)
    if source.shape != wanted:
        raise UserError(
            f"data {data.name} has images {source.shape}, the model takes {wanted}{_remedy(data, source, wanted, new)}"
        )
    if source.classes > labels:
        fix = f": --set model.num_classes={source.classes}" if new else ""
        raise UserError(f"data {data.name} has {source.classes} classes, the model knows {labels}{fix}")


def _check_images(data: DataSection, source: Batches) -> None:
    """Raise UserError on videos and buckets, for models that take images of one size."""
    shapes = source.shapes if isinstance(source, BucketBatches) else (source.shape,)
    if len(shapes) > 1 or len(shapes[0]) > 3:
        kind = f"buckets of {len(shapes)} sizes" if len(shapes) > 1 else f"videos {shapes[0]}"
        raise UserError(f"data {data.name} has {kind}, and the model takes images of one size: encode with one --size")


def _remedy(data: DataSection, source: Batches, wanted: tuple[int, int, int], new: bool) -> str:
    """The settings that make images (C, H, W) fit a model; nothing where none do."""
    channels, height, width = source.shape
    if (height, width, channels) == wanted:
        return "; arr_0 looks like (N, C, H, W), wanted channels last"
    square, fixes = height == width, []
    if new and square and channels != wanted[0]:
        fixes.append(f"--set model.in_channels={channels}")
    if not new and (channels, wanted[0]) == (3, 1) and is_pictures(data.name):
        fixes.append("make its pictures grey")
    if (height, width) != wanted[1:]:
        side = wanted[1] if square or not new else 2 ** min(int(math.log2(min(height, width))), 6)
        sides = [f"--set model.input_size={height}"] if new and square else []
        sides += [f"--set data.size={side}"] if is_pictures(data.name) else []
        fixes += [" or ".join(sides)] if sides else []
    return f": {' and '.join(fixes)}" if fixes else ""


def engine_for(recipe: Recipe) -> Engine:
    """The processes of a training, and the device of this one."""
    device_for(recipe)
    return open_engine(recipe.device, recipe.compute)


def drawing_engine(recipe: Recipe, together: bool) -> Engine:
    """The processes that draw images, with the arithmetic of a single one: no TF32. together: all launched ones; else this alone."""
    alone = dataclasses.replace(recipe.compute, tf32=False, compile=False, gradient_accumulation_steps=1)
    return engine_for(dataclasses.replace(recipe, compute=alone)) if together else Engine(device_for(recipe))


def own_device(recipe: Recipe) -> torch.device:
    """The recipe's device for this one of several processes that share no step: GPU number LOCAL_RANK of its machine.

    Raises UserError where there are fewer GPUs than processes.
    """
    device, number = device_for(recipe), launched_local_rank()
    if device.type != "cuda" or device.index is not None or launched_processes() == 1:
        return device
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many processes as there "
            "are GPUs, or give --device cpu"
        )
    return torch.device("cuda", number)


def device_for(recipe: Recipe) -> torch.device:
    """The recipe's device."""
    device = choose_device(recipe.device)
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {recipe.device!r} cannot run models: use auto, cpu, cuda or mps")
    return device
