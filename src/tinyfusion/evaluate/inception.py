"""The Inception network of 2015 that defines FID, sFID and the Inception Score, in plain torch.

Sources: arXiv 1512.00567 as frozen in the graph of 2015-12-05 (1,008 classes); outputs per metric as in the ADM protocol (arXiv
2105.05233). Parameters have the names of the widely used port of that graph.
Differs from the Inception-v3 of model zoos: average pools exclude padding, the last block has a max pool instead of an
average pool, and the classes are different.

Shapes: N images, H x W pixels, channels first inside the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.evaluate.features import SPATIAL_CHANNELS, FeatureExtractor
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


# "avg", "max": pools of stride 1; "halve": max pool of stride 2; tuple: concatenated
Step = Conv | str | tuple[Conv, ...]
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
                        padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.stride == 1 else (0, 0)
                        self.add_module(conv.name, ConvNormRelu(width, conv, padding))
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
    x = x[..., left] + (x[..., right] - x[..., left]) * across  # as in the original; torch.lerp rounds otherwise
    top, bottom, down = _neighbours(x.shape[2], height, x.device)
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * down[:, None]


def _neighbours(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(before, after, weight): indices of the two input pixels and the weight of the second, for every output pixel."""
    position = torch.arange(size_out, dtype=torch.float32) * float(np.float32(size_in) / np.float32(size_out))
    before = position.floor().long().clamp(max=size_in - 1)
    after = (before + 1).clamp(max=size_in - 1)
    return before.to(device), after.to(device), (position - before).to(device)


class InceptionFeatures(FeatureExtractor):
    """`FeatureExtractor` of the Inception network, for images of any size; grey ones get three equal channels.

    Computes in float32 without TF32. `spatial` is flattened channels last, as stored moments are.
    """

    side, rule = SIDE, "bilinear (TF-1)"

    def __init__(self, network: Inception, device: torch.device, batch_size: int = 64) -> None:
        super().__init__(INCEPTION, network, device, batch_size)
        self.network = network

    def features_of(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `FeatureExtractor`."""
        pixels = pixels.expand(-1, 3, -1, -1).contiguous()
        out = self.network((resize_tf1(pixels, SIDE, SIDE) - 128.0) / 128.0)
        return out.pool, out.spatial.permute(0, 2, 3, 1).flatten(1), out.logits


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
