"""Score images against a reference: real images or stored moments, scores, and the protocol that decides comparability.

A reference in the ADM form is an npz with images in `arr_0` and the moments of a whole training set; FID and sFID take the
stored moments, precision and recall the images. Statistics of slow extractors are cached on disk by the hash of images and
weights.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tinyfusion.config.recipe import DataSection, EvaluateSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import disk_reason
from tinyfusion.core.progress import progress, say
from tinyfusion.core.reading import explained
from tinyfusion.core.rundir import atomic_write
from tinyfusion.core.tensors import read_metadata, read_safetensors
from tinyfusion.core.weights import cache_folder
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.image_source import (
    IN_MEMORY_BYTES,
    ImageSource,
    has_images,
    open_npz,
    read_moments,
    source_of,
    streamed_pictures,
)
from tinyfusion.data.originals import open_originals
from tinyfusion.data.parquet import HUB, PARQUET, WHOLE
from tinyfusion.evaluate.features import FeatureExtractor, hash_state
from tinyfusion.evaluate.inception import INCEPTION, NUM_FEATURES
from tinyfusion.evaluate.metrics import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    nearest_training_distance,
    precision_recall,
    summarise,
)
from tinyfusion.jobs.assemble import image_set, pictures
from tinyfusion.sample.drive import to_uint8

READ_IMAGES = 256  # at a time
_NUM_SPATIAL = 2023
NEAREST_PRODUCTS = 2e12  # multiply-adds that the distance to the nearest reference image may take: minutes on two cores
STORED_MOMENTS = " with stored moments"


@dataclass(frozen=True)
class Reference:
    """Real images with one feature extractor.

    source: None where only moments are stored. stored: moments by their names in the ADM form, empty where they are computed.
    """

    name: str
    hash: str
    source: ImageSource | None
    stored: dict[str, np.ndarray]
    extractor: FeatureExtractor

    def __len__(self) -> int:
        return len(self.source) if self.source else 0

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Moments and features. Raises UserError where an image cannot be read."""
        computed = self._computed() if self.source else None
        if not self.stored:
            assert computed is not None
            return computed
        spatial = Moments(self.stored["mu_s"], self.stored["sigma_s"]) if "mu_s" in self.stored else None
        pool = Moments(self.stored["mu"], self.stored["sigma"])
        return FeatureStatistics(len(self), pool, spatial, computed.features if computed else None, None)

    @property
    def pool(self) -> Moments:
        """Moments of the pooled features."""
        return self.statistics.pool

    def _computed(self) -> FeatureStatistics:
        assert self.source is not None
        if not self.extractor.slow:
            return statistics_of(self.source, self.extractor, f"reference {self.name}")
        key = f"{self.source.hash()}\0{self.extractor.name}\0{self.extractor.hash}\0{self.treatment}"
        file = cache_folder() / "moments" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if (cached := _read(file, key)) is not None:
            return cached
        computed = statistics_of(self.source, self.extractor, f"reference {self.name}")
        _write(file, key, computed)
        return computed

    @property
    def treatment(self) -> str:
        """How the extractor resizes these images."""
        return self.extractor.treatment(self.source.shape[1:]) if self.source else ""


def open_reference(name: str, extractor: FeatureExtractor, data: DataSection | None = None) -> Reference:
    """A reference by name, parquet, npz or folder; data: as for `open_images`. Raises UserError where it is unfit."""
    path = Path(name)
    stored = read_moments(path) if path.suffix == ".npz" and path.is_file() else {}
    source = open_images(name, data) if not stored or has_images(path) else None
    if stored and extractor.name != INCEPTION:
        if source is None:
            raise UserError(
                f"reference {name} holds moments of Inception features and no images, and the features are {extractor.name}: "
                "give one with images, or --set evaluate.features=inception"
            )
        stored = {}
    for mean, wanted in (("mu", NUM_FEATURES), ("mu_s", _NUM_SPATIAL)):
        if mean in stored and len(stored[mean]) != wanted:
            raise UserError(f"reference {name}: {mean} has {len(stored[mean])} values; Inception's has {wanted}")
    if stored and "mu" not in stored:
        raise UserError(f"reference {name} has mu_s without mu: FID needs mu and sigma")
    if source is not None:
        extractor.check(source.first() if source.array is None else source.array, f"reference {name}")
        if len(source) < 2:
            raise UserError(f"reference {name} has {len(source)} image: a covariance needs at least 2")
    label = name if name in REAL_SETS else path.name
    return Reference(label, _hash(source, stored), source, stored, extractor)


def _hash(source: ImageSource | None, stored: dict[str, np.ndarray]) -> str:
    """SHA-256 of the images and of stored moments."""
    images = source.hash() if source else ""
    if not stored:
        return images
    moments = hash_state({key: torch.from_numpy(values) for key, values in stored.items()})
    return hashlib.sha256(f"{images}\0{moments}".encode()).hexdigest()


def open_images(name: str, data: DataSection | None = None) -> ImageSource:
    """Open a real set by name, pictures resized as `data` says, or an npz. Raises UserError where there are no images."""
    path, data = Path(name), data or DataSection()
    if name in REAL_SETS:
        return source_of(to_uint8(torch.from_numpy(image_set(name).x)))
    if path.is_dir():
        originals = open_originals(name)
        source = streamed_pictures(originals, data.size, data.orientation)
        if math.prod(source.shape) > IN_MEMORY_BYTES:
            say(originals.remarks)
            return source
    if name.startswith(WHOLE) or path.is_dir():
        return source_of(pictures(name, data.size, data.orientation).pixels)
    if path.suffix != ".npz":
        raise UserError(
            f"no images at {name!r}: there is {', '.join(REAL_SETS)}, {PARQUET}PATH, {HUB}ORG/NAME, a folder of pictures, or "
            "an .npz with arr_0"
        )
    return open_npz(path)


def statistics_of(
    source: ImageSource, extractor: FeatureExtractor, title: str, splits_size: int = 5000
) -> FeatureStatistics:
    """Statistics of a set of images, a batch at a time. Raises UserError where they are not finite."""
    with progress(title, len(source), "images") as bar, explained(title, ValueError):
        return summarise((extractor(batch) for batch in source.read(READ_IMAGES)), len(source), splits_size, bar)


def _write(file: Path, key: str, statistics: FeatureStatistics) -> None:
    """Cache statistics; a cache that cannot be written is reported and costs only time."""
    assert statistics.features is not None
    moments = {"pool": statistics.pool} | ({"spatial": statistics.spatial} if statistics.spatial else {})
    arrays = {"features": statistics.features}
    for name, each in moments.items():
        arrays |= {f"{name}_mean": each.mean, f"{name}_covariance": each.covariance}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    try:
        with atomic_write(file) as temporary:
            save_file(tensors, temporary, metadata={"of": key, "sum": hash_state(tensors)})
    except (OSError, SafetensorError) as error:
        reason = disk_reason(error) if isinstance(error, OSError) else str(error)
        print(f"the statistics of the reference are not cached: {file}: {reason}", file=sys.stderr)


def _read(file: Path, key: str) -> FeatureStatistics | None:
    """Cached statistics of this key; None where there are none or the file is damaged."""
    if not file.is_file():
        return None
    try:
        metadata, tensors = read_metadata(file), read_safetensors(file)
        if metadata.get("of") != key or metadata.get("sum") != hash_state(tensors):
            raise ValueError("its checksum differs")
        arrays = {name: values.numpy() for name, values in tensors.items()}
        spatial = Moments(arrays["spatial_mean"], arrays["spatial_covariance"]) if "spatial_mean" in arrays else None
        pool = Moments(arrays["pool_mean"], arrays["pool_covariance"])
        return FeatureStatistics(len(arrays["features"]), pool, spatial, arrays["features"], None)
    except (ValueError, KeyError) as error:
        print(f"{file} is damaged ({error}): the statistics are computed again", file=sys.stderr)
        return None


def score(
    images: np.ndarray | ImageSource, reference: Reference, extractor: FeatureExtractor, neighbours: int = 3,
    splits_size: int = 5000,
) -> dict[str, Any]:  # fmt: skip
    """FID, sFID, Inception Score, precision, recall and the median distance to the nearest reference image.

    images: uint8 (N, H, W, C), more than `neighbours` of them. Distances are L2 in pixels of [-1, 1]. None where the
    extractor or the reference gives no such number; for the last, also where it would take hours.
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
    reference: Reference, extractor: FeatureExtractor, settings: EvaluateSection, sampling: str,
    shape: tuple[int, int, int] | None = None,
) -> str:  # fmt: skip
    """The protocol of scores, which comparable scores share.

    sampling: "N images | sampler ... | seed". shape: (H, W, C) of the images; None is that of the reference.
    """
    treatment = extractor.treatment(shape) if shape else reference.treatment
    seen, stored = f" at {treatment}" if treatment else "", STORED_MOMENTS if reference.stored else ""
    precision = f"k {settings.neighbours}, splits of {settings.is_splits_size}"
    real = f"{reference.name} {reference.hash[:8]} {len(reference)}{stored}"
    return f"{extractor.name} {extractor.hash[:8]}{seen}, {precision} | {real} | {sampling}"
