"""Feature extractors for FID and related metrics: the base class, and the small classifier of the digits.

Scores of different extractors do not compare, so the name of an extractor and the hash of its weights are part of every
protocol. Extractors are built from tensors; nothing here reads files.

Shapes: N images, H x W pixels, C channels, D pooled features, (h, w) the last feature map, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.tensors import digest_of
from tinyfusion.families.tensor_checks import in_float32

SPATIAL_CHANNELS = 7  # as sFID takes from Inception, arXiv 2103.03841
DIGITS_FEATURES = "digits-classifier"
FEATURE_CHOICES = (
    "name others by --set evaluate.features=: inception (weights downloaded once, images of any size), a file of its weights, "
    "dinov2:FOLDER (saved by transformers; needs that package), or a folder with classifier.json"
)


@dataclass(frozen=True)
class Features:
    """Features of N images: pool (N, D) for FID, precision and recall; spatial (N, 7 h w) for sFID; logits (N, K).

    spatial and logits are None if the extractor has no maps or no classes.
    """

    pool: np.ndarray
    spatial: np.ndarray | None
    logits: np.ndarray | None


class FeatureExtractor:
    """A frozen network that turns uint8 images (N, H, W, 1 or 3) into features, `batch_size` images at a time, in float32.

    name, hash: its name and the SHA-256 of its weights, for protocols. device: where it runs; distances between features are
    computed there too. slow: whether statistics of references are cached on disk. side, rule: size in pixels to which images
    are resized, and how. grey: whether images have one channel.
    """

    slow, grey = True, False
    side, rule = 0, ""

    def __init__(self, name: str, network: nn.Module, device: torch.device, batch_size: int) -> None:
        self.name, self.hash, self.device, self.batch_size = name, hash_state(network.state_dict()), device, batch_size
        network.to(device).eval().requires_grad_(False)

    def treatment(self, shape: tuple[int, int, int]) -> str:
        """Preprocessing of images (H, W, C), for the protocol; empty if there is none."""
        height, width, channels = shape
        sizes = "" if (height, width) == (self.side, self.side) else f" to {self.side} x {self.side} {self.rule}"
        return f"{height} x {width}{sizes}{', grey in 3 channels' if channels == 1 else ''}"

    def check(self, images: np.ndarray, what: str) -> None:
        """Raise UserError unless it accepts `images`; `what` names them in the message."""
        if images.dtype != np.uint8:
            raise UserError(f"{what}: features {self.name} take uint8 images (0 to 255); got {images.dtype}")
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            wanted = "images (N, H, W, channels) with 1 or 3 channels"
            raise UserError(f"{what}: features {self.name} take {wanted}; got {tuple(images.shape)}")

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images (N, H, W, C). Raises UserError as `check` does."""
        self.check(images, "images")
        batches: list[list[Any]] = []
        with full_float32():
            for first in range(0, max(len(images), 1), self.batch_size):
                pixels = torch.from_numpy(np.ascontiguousarray(images[first : first + self.batch_size])).to(self.device)
                values = self.features_of(pixels.permute(0, 3, 1, 2).float())
                batches.append([None if value is None else value.cpu().numpy() for value in values])
        merged: list[Any] = [None if c[0] is None else np.concatenate(c) for c in zip(*batches, strict=True)]
        return Features(*merged)

    def features_of(self, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Pool, spatial and logits (see `Features`) of pixels (B, C, H, W) float32 in 0 to 255."""
        raise NotImplementedError


@contextmanager
def full_float32() -> Iterator[None]:
    """Context without TF32: float32 products and convolutions on CUDA use all 24 bits."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@dataclass(frozen=True)
class ClassifierArch:
    """Sizes of the digits classifier. widths: channels of its three convolutions, the last of them D."""

    image_size: int = 8
    in_channels: int = 1
    widths: tuple[int, int, int] = (32, 64, 96)
    num_classes: int = 10


class SmallClassifier(nn.Module):
    """Classifier for small images: three 3 x 3 convolutions, one 2 x 2 average pool, global average, one linear layer.

    Smooth activations and no normalisation, so that no feature is dead, saturated or invariant to contrast: FID must grow
    with every degradation.
    """

    def __init__(self, arch: ClassifierArch) -> None:
        super().__init__()
        first, second, last = arch.widths
        self.conv1 = nn.Conv2d(arch.in_channels, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, last, 3, padding=1)
        self.head = nn.Linear(last, arch.num_classes)

    def last_map(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) in [-1, 1] -> the last feature map (N, D, H/2, W/2)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(self.conv3(F.avg_pool2d(x, 2)))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) in [-1, 1] -> logits (N, K)."""
        logits: Tensor = self.head(self.last_map(x).mean((2, 3)))
        return logits


class ClassifierFeatures(FeatureExtractor):
    """`FeatureExtractor` of a `SmallClassifier`, for images of its size, on the CPU."""

    slow = False

    def __init__(self, name: str, classifier: SmallClassifier, arch: ClassifierArch, batch_size: int = 256) -> None:
        super().__init__(name, classifier, torch.device("cpu"), batch_size)
        self.classifier, self.arch, self.grey = classifier, arch, arch.in_channels == 1

    def check(self, images: np.ndarray, what: str) -> None:
        """Raise UserError unless `images` are uint8 of the classifier's size and channels."""
        wanted = (self.arch.image_size, self.arch.image_size, self.arch.in_channels)
        if images.dtype == np.uint8 and (images.ndim != 4 or images.shape[1:] != wanted):
            sizes = f"images of height, width, channels {wanted}; got {tuple(images.shape[1:])}"
            raise UserError(f"{what}: features {self.name} take {sizes}; {FEATURE_CHOICES}")
        super().check(images, what)

    def treatment(self, _shape: tuple[int, int, int]) -> str:
        """Empty: images have the classifier's size."""
        return ""

    def features_of(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `FeatureExtractor`."""
        feature_map = self.classifier.last_map(pixels / 127.5 - 1)
        pool = feature_map.mean((2, 3))
        return pool, feature_map[:, :SPATIAL_CHANNELS].flatten(1), self.classifier.head(pool)


def hash_state(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name."""
    return str(digest_of(tensors, lambda dtype: str(dtype).removeprefix("torch.")).hexdigest())


def small_classifier(name: str, arch: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ClassifierFeatures:
    """Build the digits classifier from its sizes and weights. Raises ValueError if they do not fit."""
    try:
        sizes = ClassifierArch(**{**arch, "widths": tuple(arch["widths"])})
        with torch.device("meta"):
            classifier = SmallClassifier(sizes)
        state = in_float32(tensors, classifier.state_dict(), "its weights do not fit")
        classifier.load_state_dict(state, assign=True)
    except (KeyError, TypeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"sizes and weights of {name} do not fit: {error}") from error
    return ClassifierFeatures(name, classifier, sizes)


ExtractorBuilder = Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], FeatureExtractor]
EXTRACTORS: dict[str, ExtractorBuilder] = {DIGITS_FEATURES: small_classifier}
