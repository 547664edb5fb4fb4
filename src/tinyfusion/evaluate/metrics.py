"""FID, Inception Score, precision and recall of features, whole or streamed, in float64.

Non-finite features raise ValueError. Not reproduced: the float16 distances of the published precision and recall.

Shapes: N samples, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import eigvalsh, svdvals
from scipy.linalg.lapack import dpstrf
from scipy.special import log_softmax, xlogy
from torch import Tensor

from tinyfusion.core.signals import check_stop
from tinyfusion.evaluate.features import Features

BLOCK_ENTRIES = 2**22  # entries of one block of a distance matrix: 32 MiB
_MAX_ERROR = 1e-9  # of the trace of a root, relative to the traces of the covariances
_EPS = float(np.finfo(np.float64).eps)


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features."""

    mean: np.ndarray
    covariance: np.ndarray


class RunningMoments:
    """Running mean and covariance of batches of rows, merged as in Chan, Golub, LeVeque, 1983 (equation 1.5)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        """Add rows (B, D). Raises ValueError on non-finite values and on another D than before."""
        if not len(rows):
            return
        values = _matrix(rows, "features")
        mean = values.mean(0)
        values = values - mean
        scatter = values.T @ values
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = len(values), mean, scatter
            return
        if len(mean) != len(self._mean):
            raise ValueError(f"rows of {len(mean)} features after rows of {len(self._mean)}")
        total = self.count + len(values)
        step = mean - self._mean
        scatter += np.outer(step, step * (self.count * len(values) / total))
        self._scatter += scatter
        self._mean = self._mean + step * (len(values) / total)
        self.count = total

    def moments(self) -> Moments:
        """Moments of all rows so far. Raises ValueError for fewer than 2."""
        if self._mean is None or self._scatter is None or self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; got {self.count}")
        return Moments(self._mean, self._scatter / (self.count - 1))


def feature_moments(features: ArrayLike) -> Moments:
    """Moments of features (N, D); N may be smaller than D. Raises ValueError for N < 2 or values not finite."""
    running = RunningMoments()
    running.add(_matrix(features, "features"))
    return running.moments()


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: FID when the features are Inception's; 0 or more.

        |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2)

    Raises ValueError on shapes that do not fit, values that are not finite, or a covariance that is none.
    Source: arXiv 1706.08500, section 2.
    Differs: no square root of a general matrix. With sigma = A A^T and B B^T from pivoted Cholesky factors, of as many
    columns as the rank, the trace of the root is the nuclear norm of A^T B. Singular covariances are therefore exact and
    cheaper, without the published offset of 1e-6 on the diagonals and without a complex part to drop.
    """
    mean1, mean2 = _matrix(np.atleast_2d(mu1), "mu1")[0], _matrix(np.atleast_2d(mu2), "mu2")[0]
    cov1, cov2 = _matrix(np.atleast_2d(sigma1), "sigma1"), _matrix(np.atleast_2d(sigma2), "sigma2")
    size = len(mean1)
    if len(mean2) != size or cov1.shape != (size, size) or cov2.shape != (size, size):
        sizes = f"means {len(mean1)}, {len(mean2)}, covariances {cov1.shape}, {cov2.shape}"
        raise ValueError(f"moments do not fit: {sizes}")
    traces = float(np.trace(cov1) + np.trace(cov2))
    root = _nuclear_norm(_factor(cov1).T @ _factor(cov2), traces)
    difference = mean1 - mean2
    return max(float(difference @ difference + traces - 2 * root), 0.0)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """(D, rank) A with A A^T the covariance; pivots within rounding of 0 count as 0."""
    scale = float(np.abs(covariance).max())
    if float(np.abs(covariance - covariance.T).max()) > 1e-6 * scale:
        raise ValueError("a covariance must be symmetric")
    if scale == 0:
        return np.zeros((len(covariance), 0))
    factor, pivots, rank, _ = dpstrf(covariance, lower=1)
    lower = np.tril(factor[:, :rank])
    root = np.empty_like(lower)
    root[pivots - 1] = lower
    if rank < len(covariance):
        left_over = covariance - root @ root.T
        if float(np.abs(left_over).max()) > 1e-6 * scale:
            least = float(eigvalsh(covariance, subset_by_index=(0, 0))[0])
            raise ValueError(f"a covariance must not have negative eigenvalues; got {least:.3g}")
    return root


def _nuclear_norm(product: np.ndarray, scale: float) -> float:
    """Sum of the singular values of A^T B, to 1e-9 of `scale`.

    Square roots of the eigenvalues of its Gram matrix take half the time but lose precision near 0; the singular values are
    computed where the estimated error exceeds that.
    """
    if 0 in product.shape:
        return 0.0
    wide = product if product.shape[0] <= product.shape[1] else product.T
    squares = np.maximum(eigvalsh(wide @ wide.T, overwrite_a=True, check_finite=False), 0.0)
    roots = np.sqrt(squares)
    rounding = len(squares) ** 0.5 * _EPS * float(squares[-1])
    error = np.minimum(np.sqrt(rounding), rounding / (2 * np.maximum(roots, 1e-300))).sum()
    if error <= _MAX_ERROR * scale:
        return float(roots.sum())
    return float(svdvals(product, check_finite=False).sum())


class RunningScore:
    """Running Inception Score over contiguous splits of `split_size` images; see `inception_score`."""

    def __init__(self, split_size: int) -> None:
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1; got {split_size}")
        self.split_size = split_size
        self._done: list[float] = []
        self._count = 0
        self._negative_entropy = 0.0
        self._sum: np.ndarray | None = None

    def add(self, logits: np.ndarray) -> None:
        """Add logits (B, K), in the order of the images."""
        while len(logits):
            now, logits = np.split(logits, [self.split_size - self._count])
            logs = log_softmax(now.astype(np.float64), axis=1)
            probabilities = np.exp(logs)
            self._negative_entropy += float(np.where(probabilities > 0, probabilities * logs, 0.0).sum())
            self._sum = probabilities.sum(0) + (0.0 if self._sum is None else self._sum)
            self._count += len(now)
            if self._count == self.split_size:
                self._close()

    def _close(self) -> None:
        assert self._sum is not None
        mean = self._sum / self._count
        self._done.append(math.exp(max(self._negative_entropy / self._count - float(xlogy(mean, mean).sum()), 0.0)))
        self._count, self._negative_entropy, self._sum = 0, 0.0, None

    def score(self) -> float:
        """Mean over splits, the last of which may be shorter. Call it once, after all images."""
        if self._count:
            self._close()
        if not self._done:
            raise ValueError("an Inception Score needs at least one image")
        return float(np.mean(self._done))


def inception_score(logits: ArrayLike, split_size: int = 5000) -> float:
    """exp of the mean KL(p(y|x) || p(y)), averaged over contiguous splits of `split_size`; between 1 and K.

    logits: (N, K); the last split may be shorter. Raises ValueError if there are none or they are not finite.
    Source: arXiv 1606.03498, section 4; splits as the ADM protocol makes them.
    """
    running = RunningScore(split_size)
    running.add(_matrix(logits, "logits"))
    return running.score()


def precision_recall(
    reference: ArrayLike, samples: ArrayLike, k: int = 3, device: torch.device | None = None
) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples'; both 0 to 1.

    reference, samples: features (N, D), (M, D). Distances are computed in float64 by blocks, on `device` if it is CUDA, else on
    the CPU. A set's manifold is the union of closed balls around its points that reach to their k-th nearest other point.
    Raises ValueError if a set has at most k points or values are not finite. Source: arXiv 1904.06991, section 3.
    """
    real, drawn = _rows(reference, "reference"), _rows(samples, "samples")
    if real.shape[1] != drawn.shape[1]:
        raise ValueError(f"reference has {real.shape[1]} features, samples have {drawn.shape[1]}")
    if k < 1 or min(len(real), len(drawn)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images on both sides; got {len(real)} and {len(drawn)}")
    place = device if device is not None and device.type == "cuda" else torch.device("cpu")
    centre = real.mean(0, dtype=np.float64)  # reduces rounding errors of distances
    left, right = _Points(real, centre, place), _Points(drawn, centre, place)
    real_radii, drawn_radii = left.squared_radii(k), right.squared_radii(k)
    inside = torch.zeros(len(drawn), dtype=torch.bool, device=place)
    covered = torch.zeros(len(real), dtype=torch.bool, device=place)
    for rows in right.blocks():
        for columns in left.blocks():
            distances = right.squared_distances(rows, left, columns)
            inside[rows] |= (distances <= real_radii[columns]).any(1)
            covered[columns] |= (distances <= drawn_radii[rows, None]).any(0)
    return float(inside.double().mean()), float(covered.double().mean())


class _Points:
    """Points (N, D) minus `centre`, converted to float64 on a device one block of rows at a time."""

    def __init__(self, points: np.ndarray, centre: np.ndarray, device: torch.device) -> None:
        self.points, self.device = points, device
        self.centre = torch.from_numpy(centre).to(device)
        self.norms = torch.cat([(self.rows(block) ** 2).sum(1) for block in self.blocks()])

    def rows(self, block: slice) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.points[block])).to(self.device).double() - self.centre

    def blocks(self, first: int = 0) -> Iterator[slice]:
        """Slices of rows from `first` on, sized so that a block of distances has BLOCK_ENTRIES."""
        side = max(math.isqrt(BLOCK_ENTRIES), 1)
        for start in range(first, len(self.points), side):
            check_stop()
            yield slice(start, min(start + side, len(self.points)))

    def squared_distances(self, rows: slice, other: _Points, columns: slice) -> Tensor:
        """A block of |u|^2 - 2 u v + |v|^2; values within rounding of 0 are set to 0, so copies coincide."""
        norms = self.norms[rows, None] + other.norms[columns]
        distances = norms - 2 * self.rows(rows) @ other.rows(columns).T
        return torch.where(distances > self.points.shape[1] * _EPS * norms, distances, 0.0)

    def squared_radii(self, k: int) -> Tensor:
        """(N,) squared distance of every point to its k-th nearest other point.

        Distances are symmetric, so a block serves its rows and its columns.
        """
        nearest = torch.full((len(self.points), k + 1), math.inf, dtype=torch.float64, device=self.device)

        def merge(block: slice, distances: Tensor) -> None:
            both = torch.cat([nearest[block], distances], dim=1)
            nearest[block] = both.topk(k + 1, dim=1, largest=False, sorted=False).values

        for rows in self.blocks():
            for columns in self.blocks(rows.start):
                distances = self.squared_distances(rows, self, columns)
                merge(rows, distances)
                if columns.start != rows.start:
                    merge(columns, distances.T)
        return nearest.max(1).values


def nearest_training_distance(images: np.ndarray, training: np.ndarray) -> float:
    """Median over `images` of the L2 pixel distance to the nearest image of `training`, pixels in [-1, 1].

    Both (N, ...) of equal shape beyond N, uint8 or floats in [-1, 1]. A value far below that of held-out images
    means that training images are copied. Raises ValueError on shapes that do not fit or values that are not finite.
    """
    if images.shape[1:] != training.shape[1:]:
        raise ValueError(f"images {images.shape[1:]} and training images {training.shape[1:]} differ in shape")
    cpu, drawn, real = torch.device("cpu"), _pixels(images), _pixels(training)
    nothing = np.zeros(drawn.shape[1])
    left, right = _Points(drawn, nothing, cpu), _Points(real, nothing, cpu)
    nearest = torch.full((len(drawn),), math.inf, dtype=torch.float64)
    for rows in left.blocks():
        for columns in right.blocks():
            nearest[rows] = torch.minimum(nearest[rows], left.squared_distances(rows, right, columns).amin(1))
    return float(np.median(nearest.sqrt().numpy()))


def _pixels(images: np.ndarray) -> np.ndarray:
    """(N, H W C) float64 in [-1, 1]."""
    flat = images.reshape(len(images), -1)
    return _matrix(flat / 127.5 - 1.0 if images.dtype == np.uint8 else flat, "images")


def _rows(values: ArrayLike, what: str) -> np.ndarray:
    """`values` as a finite, non-empty matrix: float32 stays float32, everything else becomes float64."""
    matrix = np.asarray(values)
    single = matrix.dtype == np.float32 and matrix.ndim == 2 and matrix.size > 0
    return matrix if single and math.isfinite(float(matrix.sum(dtype=np.float64))) else _matrix(matrix, what)


def _matrix(values: ArrayLike, what: str) -> np.ndarray:
    """`values` as a finite, non-empty float64 matrix."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{what} must be a matrix with at least one entry; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} hold {int((~np.isfinite(matrix)).sum())} values that are not finite")
    return matrix


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of a set of images for all metrics.

    pool, spatial: moments; spatial is None if the extractor has no maps. features: (N, D) float32, None if only
    moments are known. inception_score: None without logits.
    """

    count: int
    pool: Moments
    spatial: Moments | None
    features: np.ndarray | None
    inception_score: float | None


def summarise(
    features: Iterable[Features], count: int, split_size: int = 5000, tick: Callable[[int], object] | None = None
) -> FeatureStatistics:
    """Statistics of batches of features of `count` images in all. tick: called with the number of images so far.

    Raises ValueError if there are fewer or more than `count`, fewer than 2, or non-finite values.
    """
    pool, spatial, score = RunningMoments(), RunningMoments(), RunningScore(split_size)
    pooled: np.ndarray | None = None
    done = 0
    has_score = False
    for batch in features:
        if pooled is None:
            pooled = np.empty((count, batch.pool.shape[1]), np.float32)
        if done + len(batch.pool) > count:
            raise ValueError(f"got more than the announced {count} images")
        pooled[done : done + len(batch.pool)] = batch.pool
        done += len(batch.pool)
        pool.add(batch.pool)
        if batch.spatial is not None:
            spatial.add(batch.spatial)
        if batch.logits is not None:
            has_score = True
            score.add(batch.logits)
        if tick:
            tick(done)
    if done != count:
        raise ValueError(f"wanted {count} images; got {done}")
    spatial_moments = spatial.moments() if spatial.count else None
    return FeatureStatistics(count, pool.moments(), spatial_moments, pooled, score.score() if has_score else None)
