"""`evaluate`: images to numbers, with the protocol that says what they may be compared with."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tinyfusion.core.config import nearest
from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import EvaluateSection, Recipe
from tinyfusion.core.rundir import file_output, read_json, stamp, write_json
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.images import read_image_folder, read_images_npz
from tinyfusion.evaluate.features import EXTRACTORS, FeatureExtractor, Features
from tinyfusion.evaluate.metrics import (
    Moments,
    feature_moments,
    frechet_distance,
    inception_score,
    nearest_training_distance,
    precision_recall,
)
from tinyfusion.jobs.assemble import PARQUET, RunOptions, image_set, plain_recipe
from tinyfusion.sample.drive import to_uint8

METRICS = (
    "fid",
    "sfid",
    "inception_score",
    "precision",
    "recall",
    "nearest_reference_distance",
    "num_images",
    "protocol",
)


@dataclass(frozen=True)
class Reference:
    """Real images, their features and the moments of those: made once, used for every model."""

    name: str
    hash: str
    images: np.ndarray
    features: Features
    pool: Moments
    spatial: Moments

    def __len__(self) -> int:
        return len(self.images)


def evaluate(recipe: Recipe, options: RunOptions, samples: Path, reference: str) -> dict[str, Any]:
    """Score images (npz, folder of PNGs, real set by name) against a reference; writes the JSON at `options.out`."""
    settings = recipe.evaluate
    extractor = open_extractor(settings.features)
    images = _images(str(samples), recipe.data.size)
    _check(images, str(samples), settings, extractor)
    real = open_reference(reference, extractor, recipe.data.size)
    _check(real.images, f"reference {reference}", settings, extractor)
    protocol = protocol_of(real, extractor, settings, _sampling(samples, images))
    plain = plain_recipe(
        recipe, "evaluate", samples=image_hash(images), reference=real.hash, features=extractor.hash, protocol=protocol
    )
    for other in ("references", "checkpoints"):  # the reference that counts is given by itself
        plain["evaluate"].pop(other)
    if not file_output(options.out, "evaluate", plain, options.overwrite, read_json):
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return _numbers(read_json(options.out))
    if options.dry_run:
        return {"protocol": protocol}
    scores = score(images, real, extractor, settings.neighbours, settings.is_splits_size)
    record = {
        **stamp("evaluate", plain, "done"),
        **scores,
        "features": {"name": extractor.name, "hash": extractor.hash},
        "reference": {"name": real.name, "hash": real.hash, "count": len(real)},
        "protocol": protocol,
    }
    write_json(options.out, record)
    return _numbers(record)


def score(
    images: np.ndarray, reference: Reference, extractor: FeatureExtractor, neighbours: int = 3, splits_size: int = 5000
) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision, recall and the median distance to the nearest reference image.

    images: uint8 (N, H, W, C), more than `neighbours` of them. Distances are L2 in pixels of [-1, 1].
    """
    features = extractor(images)
    precision, recall = precision_recall(reference.features.pool, features.pool, neighbours)
    return {
        "fid": frechet_distance(*reference.pool, *feature_moments(features.pool)),
        "sfid": frechet_distance(*reference.spatial, *feature_moments(features.spatial)),
        "inception_score": inception_score(features.logits, splits_size),
        "precision": precision,
        "recall": recall,
        "nearest_reference_distance": nearest_training_distance(images, reference.images),
        "num_images": len(images),
    }


def open_reference(name: str, extractor: FeatureExtractor, size: int | None = None) -> Reference:
    """A reference by name, npz or folder, with its statistics; `size` as for `image_set`.

    Raises UserError where it cannot serve.
    """
    images = _images(name, size)
    extractor.check(images, f"reference {name}")
    if len(images) < 2:
        raise UserError(f"reference {name} has {len(images)} image: a covariance needs at least 2")
    features = extractor(images)
    label = name if name in REAL_SETS else Path(name).name
    return Reference(
        label, image_hash(images), images, features, feature_moments(features.pool), feature_moments(features.spatial)
    )


@cache
def open_extractor(name: str) -> FeatureExtractor:
    """A feature extractor that comes with the package, or one in a folder with classifier.json.

    Raises UserError where there is none, or it is damaged.
    """
    shipped = name in EXTRACTORS
    folder = Path(str(resources.files("tinyfusion"))) / "assets" / name if shipped else Path(name)
    if not shipped and not (folder / "classifier.json").is_file():
        raise UserError(
            f"unknown feature extractor {name!r}{nearest(name, EXTRACTORS)} (or a folder with classifier.json)"
        )
    remedy = "install tinyfusion again" if shipped else "make it again"
    record = read_json(folder / "classifier.json")
    try:
        build, label = EXTRACTORS[name if shipped else "digits-classifier"], name if shipped else str(record["name"])
        extractor = build(label, record["arch"], load_file(folder / "classifier.safetensors"))
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}): {remedy}") from error
    if extractor.hash != record.get("hash"):
        raise UserError(f"{folder} is damaged: its tensors do not give the hash in classifier.json; {remedy}")
    return extractor


def protocol_of(reference: Reference, extractor: FeatureExtractor, settings: EvaluateSection, sampling: str) -> str:
    """The string that two numbers must share to stand in one column. sampling: "N images | sampler ... | seed"."""
    features = f"{extractor.name} {extractor.hash[:8]}, k {settings.neighbours}, splits of {settings.is_splits_size}"
    return f"{features} | {reference.name} {reference.hash[:8]} {len(reference)} | {sampling}"


def image_hash(images: np.ndarray) -> str:
    """SHA-256 over type, shape and pixels."""
    digest = hashlib.sha256(f"{images.dtype}\0{images.shape}\0".encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _images(name: str, size: int | None) -> np.ndarray:
    """Images of a real set by name, parquet files, a folder, or an npz."""
    path = Path(name)
    if name in REAL_SETS or name.startswith(PARQUET):
        return to_uint8(torch.from_numpy(image_set(name, size).x))
    if path.is_dir():
        return read_image_folder(path)
    if path.suffix != ".npz":
        raise UserError(
            f"no images at {name!r}: there is {', '.join(REAL_SETS)}, {PARQUET}PATH, a folder of PNGs, or an .npz with arr_0"
        )
    return read_images_npz(path)[0]


def _sampling(samples: Path, images: np.ndarray) -> str:
    """How the samples were made: from the record beside an npz, else unknown. UserError where it tells of others."""
    num_images = len(images)
    if str(samples) in REAL_SETS or str(samples).startswith(PARQUET):
        return f"{num_images} images | real"
    beside = samples.with_suffix(".json")
    record = read_json(beside) if samples.suffix == ".npz" and beside.is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("protocol"), str):
        return f"{num_images} images | unknown"
    told = record.get("num_images", num_images)
    what = f"{told} images, {samples} holds {num_images}" if told != num_images else ""
    if not what and record.get("image_hash") not in (None, image_hash(images)):
        what = f"other images than {samples} holds"
    if what:
        raise UserError(f"{beside} tells of {what}: they do not belong together; sample again, or remove the record")
    return str(record["protocol"])


def _check(images: np.ndarray, what: str, settings: EvaluateSection, extractor: FeatureExtractor) -> None:
    """UserError on images or settings that give no number."""
    extractor.check(images, what)
    if settings.neighbours < 1 or settings.is_splits_size < 1:
        raise UserError(
            "evaluate.neighbours and evaluate.is_splits_size are at least 1; "
            f"got {settings.neighbours} and {settings.is_splits_size}"
        )
    if len(images) <= settings.neighbours:
        raise UserError(
            f"{what} has {len(images)} images: precision and recall with {settings.neighbours} neighbours "
            f"need at least {settings.neighbours + 1}"
        )


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What the command line prints of an evaluation."""
    return {name: record[name] for name in METRICS}
