"""The Inception network of 2015 that defines FID, sFID and the Inception Score, in plain torch.

Sources: arXiv 1512.00567 as frozen in the graph of 2015-12-05 (1,008 classes); outputs per metric as in the ADM protocol (arXiv
2105.05233). Parameters have the names of the widely used port of that graph.
Differs from the Inception-v3 of model zoos: average pools exclude padding, the last block has a max pool instead of an
average pool, and the classes are different.

Shapes: N images, H x W pixels, channels first inside the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.evaluate.features import SPATIAL_CHANNELS, Features, hash_state
from tinyfusion.families.tensor_checks import in_float32

INCEPTION = "inception-2015-12-05"
SIDE = 299  # pixels, input of the network
NUM_FEATURES, NUM_CLASSES = 2048, 1008
_EPS = 1e-3  # of its batch norms


class Conv(NamedTuple):
    """A named convolution of a block: output channels, kernel (height, width), stride.

    Stride 1 preserves the size of the map; stride 2 has no padding.
    """

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Step = (
    Conv | str | tuple[Conv, ...]
)  # "avg", "max": pools of stride 1; "halve": max pool of stride 2; tuple: concatenated
Branch = tuple[Step, ...]
_FLAT, _HIGH = (1, 7), (7, 1)


def _block_a(pooled: int) -> list[Branch]:
    return [
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        ("avg", Conv("branch_pool", pooled)),
    ]


def _block_b() -> list[Branch]:
    return [
        (Conv("branch3x3", 384, (3, 3), 2),),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)),
        ("halve",),
    ]


def _block_c(inner: int) -> list[Branch]:
    kernels = (_HIGH, _FLAT, _HIGH)
    double = [Conv(f"branch7x7dbl_{i}", inner, kernel) for i, kernel in enumerate(kernels, start=2)]
    return [
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, _FLAT), Conv("branch7x7_3", 192, _HIGH)),
        (Conv("branch7x7dbl_1", inner), *double, Conv("branch7x7dbl_5", 192, _FLAT)),
        ("avg", Conv("branch_pool", 192)),
    ]


def _block_d() -> list[Branch]:
    first = Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, _FLAT), Conv("branch7x7x3_3", 192, _HIGH)
    return [
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
        (*first, Conv("branch7x7x3_4", 192, (3, 3), 2)),
        ("halve",),
    ]


def _block_e(pool: str) -> list[Branch]:
    def fork(name: str) -> tuple[Conv, ...]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return [
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    ]


BLOCKS: dict[str, tuple[int, list[Branch]]] = {
    "Mixed_5b": (192, _block_a(32)), "Mixed_5c": (256, _block_a(64)), "Mixed_5d": (288, _block_a(64)),
    "Mixed_6a": (288, _block_b()),
    "Mixed_6b": (768, _block_c(128)), "Mixed_6c": (768, _block_c(160)), "Mixed_6d": (768, _block_c(160)),
    "Mixed_6e": (768, _block_c(192)),
    "Mixed_7a": (768, _block_d()),
    "Mixed_7b": (1280, _block_e("avg")), "Mixed_7c": (2048, _block_e("max")),
}  # fmt: skip
SPATIAL_BLOCK = "Mixed_6d"  # its first branch begins with the channels that sFID takes


class StoredNorm(nn.Module):
    """Batch norm with fixed statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, variance, self.get_buffer("weight"), self.get_buffer("bias"), False, 0.0, _EPS)


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm with fixed statistics, ReLU."""

    def __init__(self, in_channels: int, conv: Conv, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, conv.channels, conv.kernel, conv.stride, padding, bias=False)
        self.bn = StoredNorm(conv.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated by channel."""

    def __init__(self, in_channels: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = in_channels
            for step in branch:
                convs = step if isinstance(step, tuple) and not isinstance(step, Conv) else (step,)
                for conv in convs:
                    if isinstance(conv, Conv):
                        self.add_module(conv.name, ConvNormRelu(width, conv, _padding(conv)))
                if isinstance(step, Conv):
                    width = step.channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, sum over branches, H', W')."""
        return torch.cat([self._run(branch, x) for branch in self.branches], dim=1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, Conv):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], dim=1)
        return x


def _padding(conv: Conv) -> tuple[int, int]:
    return (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.stride == 1 else (0, 0)


_POOLS = {
    "avg": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class InceptionOutputs(NamedTuple):
    """Outputs: pool (N, 2048); spatial (N, 7, 17, 17), of the first branch of Mixed_6d; logits (N, 1008), without the bias."""

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class Inception(nn.Module):
    """The Inception network of 2015; parameters by the names of its port."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormRelu(3, Conv("", 32, (3, 3), 2), (0, 0))
        self.Conv2d_2a_3x3 = ConvNormRelu(32, Conv("", 32, (3, 3)), (0, 0))
        self.Conv2d_2b_3x3 = ConvNormRelu(32, Conv("", 64, (3, 3)), (1, 1))
        self.Conv2d_3b_1x1 = ConvNormRelu(64, Conv("", 80), (0, 0))
        self.Conv2d_4a_3x3 = ConvNormRelu(80, Conv("", 192, (3, 3)), (0, 0))
        for name, (in_channels, branches) in BLOCKS.items():
            self.add_module(name, Mixed(in_channels, branches))
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> InceptionOutputs:
        """x (N, 3, 299, 299), pixels as (value - 128) / 128."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        spatial = x
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].clone()
        pool = x.mean((2, 3))
        return InceptionOutputs(pool, spatial, F.linear(pool, self.fc.weight))


def resize_tf1(x: Tensor, height: int, width: int) -> Tensor:
    """Resize (N, C, H, W) float32 to (N, C, height, width), bilinear as in TensorFlow 1, with corners not aligned.

    Output pixel i is at i x (in / out), without the half pixel of later libraries and without averaging. Images of that size
    are returned unchanged.
    """
    if x.shape[2:] == (height, width):
        return x
    left, right, across = _neighbours(x.shape[3], width, x.device)
    x = _interpolate(x[..., left], x[..., right], across)
    top, bottom, down = _neighbours(x.shape[2], height, x.device)
    return _interpolate(x[..., top, :], x[..., bottom, :], down[:, None])


def _interpolate(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """Linear interpolation in the order of operations of the original; torch.lerp uses another one above 0.5."""
    return before + (after - before) * weight


def _neighbours(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(before, after, weight): indices of the two input pixels and the weight of the second, for every output pixel."""
    position = torch.arange(size_out, dtype=torch.float32) * float(np.float32(size_in) / np.float32(size_out))
    before = position.floor().long().clamp(max=size_in - 1)
    after = (before + 1).clamp(max=size_in - 1)
    return before.to(device), after.to(device), (position - before).to(device)


class InceptionFeatures:
    """`FeatureExtractor` of the Inception network, for uint8 images of any size; grey ones get three equal channels.

    Computes in float32 without TF32. `spatial` is flattened channels last, as stored moments are. batch_size bounds memory.
    """

    name = INCEPTION
    slow = True

    def __init__(self, network: Inception, device: torch.device, batch_size: int = 64) -> None:
        self.hash = hash_state(network.state_dict())
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device
        self.batch_size = batch_size

    def check(self, images: np.ndarray, what: str) -> None:
        """Raise UserError unless `images` are uint8 (N, H, W, 1 or 3)."""
        check_pictures(images, what, self.name)

    def treatment(self, shape: tuple[int, int, int]) -> str:
        """Preprocessing of images (H, W, C), for the protocol."""
        return treatment_of(shape, SIDE, "bilinear (TF-1)")

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images (N, H, W, 1 or 3)."""
        self.check(images, "images")
        batches: list[tuple[np.ndarray, ...]] = []
        with full_float32():
            for first in range(0, max(len(images), 1), self.batch_size):
                pixels = as_rgb(images[first : first + self.batch_size], self.device)
                out = self.network((resize_tf1(pixels, SIDE, SIDE) - 128.0) / 128.0)
                spatial = out.spatial.permute(0, 2, 3, 1).flatten(1)
                batches.append(tuple(values.cpu().numpy() for values in (out.pool, spatial, out.logits)))
        pool, spatial_all, logits = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return Features(pool, spatial_all, logits)


def treatment_of(shape: tuple[int, int, int], side: int, rule: str) -> str:
    """Protocol text: preprocessing of images (H, W, C) for a network of input (side, side, 3), resized by `rule`."""
    height, width, channels = shape
    sizes = "" if (height, width) == (side, side) else f" to {side} x {side} {rule}"
    return f"{height} x {width}{sizes}{', grey in 3 channels' if channels == 1 else ''}"


def check_pictures(images: np.ndarray, what: str, features: str) -> None:
    """Raise UserError unless `images` are uint8 (N, H, W, 1 or 3); `features` names the extractor."""
    if images.dtype != np.uint8:
        raise UserError(f"{what}: features {features} take uint8 images (0 to 255); got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{what}: features {features} take images (N, H, W, channels) with 1 or 3 channels; got {tuple(images.shape)}"
        )


def as_rgb(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 (N, H, W, 1 or 3) to float32 (N, 3, H, W) in 0 to 255 on `device`."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    return pixels.float().expand(-1, 3, -1, -1).contiguous()


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


def inception_from_state(tensors: Mapping[str, Tensor], source: str = "this file") -> Inception:
    """Build the network from its 472 tensors by name; `num_batches_tracked` is ignored.

    Raises UserError that names `source` and what is missing, unexpected, misshapen or not finite.
    """
    with torch.device("meta"):
        network = Inception()
    given = {name: value for name, value in tensors.items() if not name.endswith(".num_batches_tracked")}
    state = in_float32(given, network.state_dict(), f"{source} does not hold the Inception network of FID")
    network.load_state_dict(state, assign=True)
    return network
