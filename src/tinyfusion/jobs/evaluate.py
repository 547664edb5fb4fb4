"""`evaluate`: images to numbers, with the protocol that says what they may be compared with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import EvaluateSection, Recipe
from tinyfusion.core.rundir import file_output, read_json, stamp, write_json
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.image_source import ImageSource, source_of
from tinyfusion.data.parquet import WHOLE
from tinyfusion.evaluate.features import FeatureExtractor
from tinyfusion.evaluate.metrics import frechet_distance, nearest_training_distance, precision_recall
from tinyfusion.jobs.against import fidelity, open_pairs
from tinyfusion.jobs.assemble import RunOptions, device_for, plain_recipe
from tinyfusion.jobs.extractors import open_extractor
from tinyfusion.jobs.references import Reference, open_images, open_reference, statistics_of

__all__ = ["Reference", "evaluate", "image_hash", "open_extractor", "open_reference", "protocol_of", "score"]

NEAREST_PRODUCTS = 2e12  # multiply-adds that the distance to the nearest reference image may take: minutes on two cores
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


def evaluate(
    recipe: Recipe, options: RunOptions, samples: Path, reference: str, against: Path | None = None
) -> dict[str, Any]:
    """Score images (npz, folder of PNGs, real set by name) against a reference; writes the JSON at `options.out`.

    against: an npz that another model drew from the same seeds; PSNR and SSIM of the pairs go with the scores.
    """
    settings = recipe.evaluate
    extractor = open_extractor(settings.features, str(device_for(recipe)))
    images = open_images(str(samples), recipe.data)
    _check(images, str(samples), settings, extractor)
    others = None if against is None else open_pairs(samples, against)
    real = open_reference(reference, extractor, recipe.data)
    _check_reference(real, images, settings)
    hash = images.hash()
    protocol = protocol_of(real, extractor, settings, _sampling(samples, images, hash), images.shape[1:])
    inputs = {"samples": hash, "reference": real.hash, "features": extractor.hash, "protocol": protocol}
    if others is not None:
        inputs["against"] = others.hash()
    plain = plain_recipe(recipe, "evaluate", **inputs)
    for other in ("references", "checkpoints"):  # the reference that counts is given by itself
        plain["evaluate"].pop(other)
    if not file_output(options.out, "evaluate", plain, options.overwrite, read_json):
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return _numbers(read_json(options.out))
    if options.dry_run:
        return {"protocol": protocol}
    scores = score(images, real, extractor, settings.neighbours, settings.is_splits_size)
    if others is not None and against is not None:
        scores["against"] = fidelity(images, others, against, inputs["against"])
    record = {
        **stamp("evaluate", plain, "done"),
        **scores,
        "features": {"name": extractor.name, "hash": extractor.hash},
        "reference": {"name": real.name, "hash": real.hash, "count": len(real)},
        "protocol": protocol,
    }
    file_output(options.out, "evaluate", plain, options.overwrite, read_json)  # again: nothing of others is replaced
    write_json(options.out, record)
    return _numbers(record)


def score(
    images: np.ndarray | ImageSource,
    reference: Reference,
    extractor: FeatureExtractor,
    neighbours: int = 3,
    splits_size: int = 5000,
) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision, recall and the median distance to the nearest reference image.

    images: uint8 (N, H, W, C), more than `neighbours` of them. Distances are L2 in pixels of [-1, 1]. None stands where
    the extractor, or a reference of moments alone, gives no such number, and for the last where it would take hours.
    """
    source = images if isinstance(images, ImageSource) else source_of(images)
    drawn = statistics_of(source, extractor, "features", splits_size)
    real = reference.statistics
    precision = recall = None
    if real.features is not None and drawn.features is not None:
        precision, recall = precision_recall(real.features, drawn.features, neighbours, extractor.device)
    spatial = None if real.spatial is None or drawn.spatial is None else frechet_distance(*real.spatial, *drawn.spatial)
    return {
        "fid": frechet_distance(*real.pool, *drawn.pool),
        "sfid": spatial,
        "inception_score": drawn.inception_score,
        "precision": precision,
        "recall": recall,
        "nearest_reference_distance": _nearest(source, reference.source),
        "num_images": len(source),
    }


def _nearest(images: ImageSource, real: ImageSource | None) -> float | None:
    if real is None or images.array is None or real.array is None:
        return None
    if float(len(images)) * real.array.size > NEAREST_PRODUCTS:
        return None
    return nearest_training_distance(images.array, real.array)


def protocol_of(
    reference: Reference,
    extractor: FeatureExtractor,
    settings: EvaluateSection,
    sampling: str,
    shape: tuple[int, int, int] | None = None,
) -> str:
    """The string that two numbers must share to stand in one column.

    sampling: "N images | sampler ... | seed". shape: (H, W, C) of the images; None is that of the reference.
    """
    treatment = extractor.treatment(shape) if shape else reference.treatment
    seen = f" at {treatment}" if treatment else ""
    stored = " with stored moments" if reference.stored else ""
    features = (
        f"{extractor.name} {extractor.hash[:8]}{seen}, k {settings.neighbours}, splits of {settings.is_splits_size}"
    )
    return f"{features} | {reference.name} {reference.hash[:8]} {len(reference)}{stored} | {sampling}"


def image_hash(images: np.ndarray) -> str:
    """SHA-256 over type, shape and pixels."""
    return source_of(images).hash()


def _sampling(samples: Path, images: ImageSource, hash: str) -> str:
    """How the samples were made: from the record beside an npz, else unknown. UserError where it tells of others."""
    num_images = len(images)
    if str(samples) in REAL_SETS or str(samples).startswith(WHOLE):
        return f"{num_images} images | real"
    beside = samples.with_suffix(".json")
    record = read_json(beside) if samples.suffix == ".npz" and beside.is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("protocol"), str):
        return f"{num_images} images | unknown"
    told = record.get("num_images", num_images)
    what = f"{told} images, {samples} holds {num_images}" if told != num_images else ""
    if not what and record.get("image_hash") not in (None, hash):
        what = f"other images than {samples} holds"
    if what:
        raise UserError(f"{beside} tells of {what}: they do not belong together; sample again, or remove the record")
    return str(record["protocol"])


def _check(images: ImageSource, what: str, settings: EvaluateSection, extractor: FeatureExtractor) -> None:
    """UserError on images or settings that give no number."""
    extractor.check(images.first() if images.array is None else images.array, what)
    if settings.neighbours < 1 or settings.is_splits_size < 1:
        raise UserError(
            "evaluate.neighbours and evaluate.is_splits_size are at least 1; "
            f"got {settings.neighbours} and {settings.is_splits_size}"
        )
    _check_count(images, what, settings)


def _check_reference(real: Reference, images: ImageSource, settings: EvaluateSection) -> None:
    """UserError on a reference that such images cannot be compared with."""
    if real.source is None:
        return
    _check_count(real.source, f"reference {real.name}", settings)
    if real.source.shape[1:] != images.shape[1:]:
        raise UserError(
            f"reference {real.name} has images {real.source.shape[1:]}, the samples {images.shape[1:]}: a distance between "
            "them would tell of the size; bring both to one"
        )


def _check_count(images: ImageSource, what: str, settings: EvaluateSection) -> None:
    if len(images) <= settings.neighbours:
        raise UserError(
            f"{what} has {len(images)} images: precision and recall with {settings.neighbours} neighbours "
            f"need at least {settings.neighbours + 1}"
        )


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What the command line prints of an evaluation."""
    return {name: record[name] for name in (*METRICS, *(["against"] if "against" in record else []))}
