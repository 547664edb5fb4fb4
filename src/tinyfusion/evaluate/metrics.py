"""FID and its kin as pure functions of features, in float64.

Nothing here knows images or extractors. NaN and infinity in, ValueError out: a metric of broken features is no number.
Left out on purpose: the float16 distances of the published precision and recall, which need a float32 fallback.

Shapes: N samples, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, rel_entr

BLOCK_ENTRIES = 2**24  # entries of one block of a distance matrix: 128 MiB
_EPS = float(np.finfo(np.float64).eps)


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features."""

    mean: np.ndarray
    covariance: np.ndarray


def feature_moments(features: ArrayLike) -> Moments:
    """Moments of features (N, D); N may be smaller than D. Raises ValueError for N < 2 or values not finite."""
    values = _matrix(features, "features")
    if len(values) < 2:
        raise ValueError(f"a covariance needs at least 2 samples; got {len(values)}")
    mean = values.mean(0)
    centred = values - mean
    return Moments(mean, centred.T @ centred / (len(values) - 1))


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: FID when the features are Inception's; 0 or more.

        |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)

    Raises ValueError on shapes that do not fit, values that are not finite, or a covariance that is none.
    Source: arXiv 1706.08500, section 2.
    Differs: the trace of the root is the nuclear norm of sigma1^(1/2) sigma2^(1/2), from symmetric eigenvalues and
    singular values, so singular covariances need no offset and nothing complex has to be dropped.
    """
    mean1, mean2 = _matrix(np.atleast_2d(mu1), "mu1")[0], _matrix(np.atleast_2d(mu2), "mu2")[0]
    cov1, cov2 = _matrix(np.atleast_2d(sigma1), "sigma1"), _matrix(np.atleast_2d(sigma2), "sigma2")
    size = len(mean1)
    if len(mean2) != size or cov1.shape != (size, size) or cov2.shape != (size, size):
        raise ValueError(
            f"moments do not fit: means {len(mean1)}, {len(mean2)}, covariances {cov1.shape}, {cov2.shape}"
        )
    root = np.linalg.svd(_symmetric_root(cov1) @ _symmetric_root(cov2), compute_uv=False).sum()
    difference = mean1 - mean2
    return max(float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * root), 0.0)


def _symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """The square root of a symmetric positive semi-definite matrix; eigenvalues within rounding of 0 count as 0."""
    scale = float(np.abs(covariance).max())
    if float(np.abs(covariance - covariance.T).max()) > 1e-6 * scale:
        raise ValueError("a covariance must be symmetric")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -1e-6 * max(values[-1], scale):
        raise ValueError(f"a covariance must not have negative eigenvalues; got {values[0]:.3g}")
    values = np.where(values > len(values) * _EPS * max(values[-1], 0.0), values, 0.0)
    root: np.ndarray = (vectors * np.sqrt(values)) @ vectors.T
    return root


def inception_score(logits: ArrayLike, split_size: int = 5000) -> float:
    """exp of the mean KL(p(y|x) || p(y)), averaged over contiguous splits of `split_size`; between 1 and K.

    logits: (N, K); the last split may be shorter. Raises ValueError where there are none or they are not finite.
    Source: arXiv 1606.03498, section 4; splits as the ADM protocol makes them.
    """
    values = _matrix(logits, "logits")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1; got {split_size}")
    return float(np.mean([_split_score(values[i : i + split_size]) for i in range(0, len(values), split_size)]))


def _split_score(logits: np.ndarray) -> float:
    probabilities = np.exp(log_softmax(logits, axis=1))
    divergence = rel_entr(probabilities, probabilities.mean(0)).sum(1)  # 0 log 0 = 0
    return float(np.exp(divergence.mean()))


def precision_recall(reference: ArrayLike, samples: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples'; both 0 to 1.

    reference, samples: features (N, D), (M, D). A set's manifold is the union of balls around its points that reach to
    their k-th nearest neighbour, the point itself not counted; the border counts as inside.
    Raises ValueError where a set has no k neighbours or values are not finite. Source: arXiv 1904.06991, section 3.
    """
    real, drawn = _matrix(reference, "reference"), _matrix(samples, "samples")
    if real.shape[1] != drawn.shape[1]:
        raise ValueError(f"reference has {real.shape[1]} features, samples have {drawn.shape[1]}")
    if k < 1 or min(len(real), len(drawn)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images on both sides; got {len(real)} and {len(drawn)}")
    centre = real.mean(0)  # distances do not change, their rounding error does
    real, drawn = real - centre, drawn - centre
    real_radii, drawn_radii = _squared_radii(real, k), _squared_radii(drawn, k)
    covered = np.zeros(len(real), dtype=bool)
    inside = 0
    for rows, distances in _squared_distances(drawn, real):
        inside += int((distances <= real_radii).any(1).sum())
        covered |= (distances <= drawn_radii[rows, None]).any(0)
    return inside / len(drawn), float(covered.mean())


def _squared_radii(points: np.ndarray, k: int) -> np.ndarray:
    """(N,) squared distance of every point to its k-th neighbour: index k of the sorted row, which holds itself."""
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for _, block in _squared_distances(points, points)])


def _squared_distances(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of the (N, M) matrix |u|^2 - 2 u v + |v|^2; within rounding of 0 is 0, so copies coincide."""
    left_norms, right_norms = (left**2).sum(1), (right**2).sum(1)
    step = max(BLOCK_ENTRIES // len(right), 1)
    for first in range(0, len(left), step):
        rows = slice(first, min(first + step, len(left)))
        norms = left_norms[rows, None] + right_norms
        distances = norms - 2 * left[rows] @ right.T
        yield rows, np.where(distances > left.shape[1] * _EPS * norms, distances, 0.0)


def nearest_training_distance(images: np.ndarray, training: np.ndarray) -> float:
    """Median over `images` of the L2 pixel distance to the nearest image of `training`, pixels in [-1, 1].

    Both (N, ...) of equal shape beyond N, uint8 or floats in [-1, 1]. Far below the same number of held-out images
    means that training images are copied. Raises ValueError on shapes that do not fit or values that are not finite.
    """
    if images.shape[1:] != training.shape[1:]:
        raise ValueError(f"images {images.shape[1:]} and training images {training.shape[1:]} differ in shape")
    left, right = _pixels(images), _pixels(training)
    nearest = [distances.min(1) for _, distances in _squared_distances(left, right)]
    return float(np.median(np.sqrt(np.concatenate(nearest))))


def _pixels(images: np.ndarray) -> np.ndarray:
    """(N, H W C) float64 in [-1, 1]."""
    flat = images.reshape(len(images), -1)
    return _matrix(flat / 127.5 - 1.0 if images.dtype == np.uint8 else flat, "images")


def _matrix(values: ArrayLike, what: str) -> np.ndarray:
    """A finite, non-empty float64 matrix."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{what} must be a matrix with at least one entry; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} hold {int((~np.isfinite(matrix)).sum())} values that are not finite")
    return matrix
