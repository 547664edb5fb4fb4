"""Accumulate the statistics of a stream of features that metrics need.

Stored per image: pooled features in float32, for precision and recall (50,000 x 2048 are 410 MB). Everything else is summed
in float64, so the batch size matters only up to rounding.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, xlogy

from tinyfusion.evaluate.features import Features
from tinyfusion.evaluate.metrics import Moments


class RunningMoments:
    """Running mean and covariance of batches of rows, merged as in Chan, Golub, LeVeque, 1983 (equation 1.5)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        """Add rows (B, D). Raises ValueError on non-finite values and on another D than before."""
        values = np.asarray(rows, dtype=np.float64)
        if not len(values):
            return
        if not np.isfinite(values).all():
            raise ValueError(f"features hold {int((~np.isfinite(values)).sum())} values that are not finite")
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


class RunningScore:
    """Running Inception Score over contiguous splits of `split_size` images; see `metrics.inception_score`."""

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
        pooled = np.empty((count, batch.pool.shape[1]), np.float32) if pooled is None else pooled
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
    return FeatureStatistics(
        count,
        pool.moments(),
        spatial.moments() if spatial.count else None,
        pooled,
        score.score() if has_score else None,
    )
