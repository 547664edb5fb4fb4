"""The job of `encode --pipeline`: pipeline, captions, and the work of every bucket, opened and checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.commands.encode import Work, check_multiple, encoding_work, missing_shards
from tinyfusion.config.recipe import EncodeSection, Orientation, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.launch import launched_rank
from tinyfusion.core.progress import progress
from tinyfusion.core.reading import read_json_object
from tinyfusion.data.buckets import bucket_name, nearest_bucket, parse_size
from tinyfusion.data.captions import Captioned, open_captioned, read_prompts, subset
from tinyfusion.data.clips import clip_size, read_clip
from tinyfusion.data.picture import decode, size_of
from tinyfusion.data.prompts import PromptFile
from tinyfusion.families.diffusers_classes.folder import INDEX
from tinyfusion.jobs.pipelines import pipeline_class
from tinyfusion.jobs.text_encoding import encoders_hash, encoding_arguments, results_of, takes_video
from tinyfusion.jobs.transformer_sources import pipeline_folder
from tinyfusion.models.autoencoder import quiet_logs
from tinyfusion.models.latent_space import VAE, LatentSpace, open_latent_space

_AT_A_TIME = 64  # pictures whose sizes are read
_PIXELS = 256**2  # of the pictures of which encode.batch_size are encoded at a time


@dataclass
class Job:
    """What is to be encoded. texts: without repetitions; works: by folder below --out, "" for the only one; space: on the CPU."""

    pipeline: Path
    kind: Any
    texts: tuple[str, ...]
    files: dict[str, str]
    works: dict[str, Work]
    space: LatentSpace | None
    inputs: dict[str, Any]
    remarks: tuple[str, ...]

    def prompts(self, out: Path) -> PromptFile:
        """The file of encoded prompts."""
        return PromptFile(out, len(self.texts) + 1)

    def todo(self, out: Path) -> dict[str, list[int]]:
        """Shards that are to be written, by folder."""
        return {name: missing_shards(out / name, work.spec) for name, work in self.works.items()}


def with_defaults(settings: EncodeSection, source: str | None, prompts: Path | None) -> EncodeSection:
    """The settings with their defaults. Raises UserError on settings that contradict each other."""
    if (source is None) == (prompts is None):
        raise UserError(
            "encode --pipeline wants either --data, pictures with captions, or --prompts, a file of prompts alone"
        )
    if settings.vae is not None:
        raise UserError("--vae: a pipeline brings its own autoencoder: leave --vae or --pipeline out")
    if source is not None and (settings.size is None) == (settings.sizes is None):
        raise UserError(
            "encode --pipeline wants the size of the pictures: either --size 1024, or --buckets 1024x1024,832x1216"
        )
    return dataclasses.replace(settings, mirror=bool(settings.mirror))


def opened_job(recipe: Recipe, source: str | None, prompts: Path | None) -> Job:
    """Open pipeline, pictures and captions. Raises UserError where one is missing, or they do not fit."""
    settings = recipe.encode
    name = settings.pipeline or ""
    if prompts is not None:
        texts, captioned = tuple(dict.fromkeys(read_prompts(prompts, settings.caption_column))), None
    else:
        clips = (settings.frames or 1) > 1
        captioned = open_captioned(str(source), settings.caption_column, clips)
        texts = captioned.texts
    folder = pipeline_folder(name)
    with quiet_logs():  # transformers names what is not installed
        kind = pipeline_class(folder)
    results_of(kind)
    encoding_arguments(kind, settings.max_tokens)
    files = encoders_hash(folder)
    inputs: dict[str, Any] = {"pipeline": kind.__name__, "encoders": files}
    if captioned is None:
        return Job(folder, kind, texts, files, {}, None, inputs | {"prompts": _digest(texts)}, ())
    video = takes_video(kind)
    if settings.frames is not None and not video:
        raise UserError(f"encode.frames is for videos, and a {kind.__name__} draws images: leave it out")
    space = open_latent_space(folder, name, _vae_class(folder), video)
    digest = space.hash()
    works, remarks = _works(recipe, captioned, space, digest, _cells_per_token(folder, space))
    inputs |= {"data": captioned.originals.fingerprint, "vae_hash": digest}
    return Job(folder, kind, texts, files, works, space, inputs, (*captioned.originals.remarks, *remarks))


def _digest(texts: tuple[str, ...]) -> str:
    """SHA-256 over texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _vae_class(folder: Path) -> str:
    """The class of the pipeline's autoencoder. Raises UserError where it has none."""
    entry = read_json_object(folder / INDEX).get(VAE)
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise UserError(f"{folder} has no autoencoder (component {VAE}): encode its prompts alone, by --prompts")
    if not (folder / VAE / "config.json").is_file():
        raise UserError(f"{folder / VAE} does not exist, and {INDEX} names it: the folder is incomplete")
    return entry[1]


def _cells_per_token(folder: Path, space: LatentSpace) -> int:
    """Latent cells per token and side of the pipeline's transformer, of which sizes are multiples."""
    file = folder / "transformer" / "config.json"
    config = read_json_object(file) if file.is_file() else {}
    if config.get("in_channels") == 4 * space.channels:  # 2 x 2 cells are packed to a token
        return 2
    patch = config.get("patch_size", 1)
    patch = patch[-1] if isinstance(patch, list) and patch else patch
    return patch if type(patch) is int and patch > 0 else 1


def _works(
    recipe: Recipe, captioned: Captioned, space: LatentSpace, digest: str, cells: int
) -> tuple[dict[str, Work], list[str]]:
    """The work of every bucket that has pictures, by folder, and remarks."""
    settings, originals = recipe.encode, captioned.originals
    sizes = list(dict.fromkeys(parse_size(text, "encode.sizes") for text in settings.sizes or ()))
    frames, orientation = settings.frames or 1, settings.orientation
    for height, width in sizes or [(settings.size or 0, settings.size or 0)]:
        for side in (height, width):
            field = "encode.sizes" if sizes else "encode.size"
            check_multiple(field, side, space.factor * cells, f"a token of {space.name}")
        space.shape(height, width, frames)
    reader = partial(read_clip, frames=frames) if space.video else decode

    def work(height: int, width: int, rows: np.ndarray | None) -> Work:
        part = originals if rows is None else subset(originals, rows)
        size = height if height == width else (height, width)
        shape = space.shape(height, width, frames)
        batch = max(1, min(settings.batch_size, settings.batch_size * _PIXELS // (height * width * frames)))
        own = dataclasses.replace(recipe, encode=dataclasses.replace(settings, batch_size=batch))
        made = encoding_work(own, part, space, shape, size, reader, digest)
        made.about |= {"height": height, "width": width, "frames": frames, "batch_size": batch}
        return made

    if not sizes:
        assert settings.size is not None
        return {"": work(settings.size, settings.size, None)}, []
    buckets = _assigned(captioned, sizes, orientation, video=space.video)
    works = {bucket_name(sizes[k]): work(*sizes[k], rows) for k, rows in enumerate(buckets) if len(rows)}
    classes = len(captioned.texts)
    for each in works.values():
        each.spec = dataclasses.replace(each.spec, classes=classes)
    shares = ", ".join(f"{h}x{w} {len(rows):,}" for (h, w), rows in zip(sizes, buckets, strict=True))
    return works, [f"{originals.name}: pictures by bucket: {shares}"]


def _assigned(
    captioned: Captioned, sizes: list[tuple[int, int]], orientation: Orientation, video: bool
) -> list[np.ndarray]:
    """The rows of every bucket, by the sizes in the headers of all pictures."""
    originals, files = captioned.originals, captioned.files

    def bucket(item: tuple[str, Any]) -> int:
        where, content = item
        size = clip_size(content, where, orientation) if video else size_of(content, where, orientation)
        return nearest_bucket(size, sizes)

    rows: list[list[int]] = [[] for _ in sizes]
    with (
        progress("sizes of pictures", len(originals), "pictures", shown=launched_rank() == 0) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1), "sizes") as threads,
    ):
        for first in range(0, len(originals), _AT_A_TIME):
            num = min(_AT_A_TIME, len(originals) - first)
            items = [(file, Path(file)) for file in files[first : first + num]] or list(originals.contents(first, num))
            for row, index in enumerate(threads.map(bucket, items), first):
                rows[index].append(row)
            bar(first + num)
    return [np.array(each, np.int64) for each in rows]
