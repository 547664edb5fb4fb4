"""Images against a reference: the scores, and the protocol that says which of them may be compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyfusion.config.recipe import EvaluateSection
from tinyfusion.data.image_source import ImageSource, source_of
from tinyfusion.evaluate.features import FeatureExtractor
from tinyfusion.evaluate.metrics import frechet_distance, nearest_training_distance, precision_recall
from tinyfusion.jobs.references import Reference, statistics_of

NEAREST_PRODUCTS = 2e12  # multiply-adds that the distance to the nearest reference image may take: minutes on two cores
STORED_MOMENTS = " with stored moments"


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
    stored = STORED_MOMENTS if reference.stored else ""
    features = (
        f"{extractor.name} {extractor.hash[:8]}{seen}, k {settings.neighbours}, splits of {settings.is_splits_size}"
    )
    return f"{features} | {reference.name} {reference.hash[:8]} {len(reference)}{stored} | {sampling}"
