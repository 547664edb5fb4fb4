"""What a family says so that the width and the tokens of its blocks can be chosen anew for every timestep and image.

Units. A block has H heads and H groups of hidden channels: unit h of the attention is head h (its rows of q, k and v, its
columns of the output projection), unit j of the MLP is a run of hidden channels (rows of the first layer, columns of the
second). Source: DyDiT (arXiv 2410.03456).

Shapes: B images, N tokens, D width, H heads, d channels of a head, g hidden channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

TokenMode = Literal["gathered", "bucketed", "masked"]


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of every block. Raises ValueError where hidden channels cannot be shared out to as many groups as heads."""

    width: int
    num_heads: int
    head_width: int
    mlp_width: int
    num_tokens: int

    def __post_init__(self) -> None:
        if self.mlp_width % self.num_heads:
            raise ValueError(
                f"{self.mlp_width} hidden channels of an MLP cannot be cut into {self.num_heads} equal groups, one per head"
            )

    @property
    def group_width(self) -> int:
        """g, hidden channels of a group."""
        return self.mlp_width // self.num_heads

    @property
    def attention_macs(self) -> int:
        """Multiply-accumulates of the attention with all heads: q, k, v, output projection, both products of attention."""
        inner = self.num_heads * self.head_width
        return 4 * self.num_tokens * self.width * inner + 2 * self.num_tokens**2 * inner

    @property
    def mlp_macs(self) -> int:
        """Multiply-accumulates of the MLP with all groups on all tokens."""
        return 2 * self.num_tokens * self.width * self.mlp_width


class TokenSelection(Protocol):
    """A module that says which tokens the MLP sees."""

    def __call__(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, N, D) after the attention, noise (B, N) in training -> mask (B, N) float32 of exactly 0 and 1."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """(B, N) float32; a token is kept where its logit is above 0."""
        ...


@dataclass(frozen=True)
class BlockSlices:
    """The weights of a sub-network of one block: k heads, m hidden channels. Views where they can be.

    qkv (k * 3 * d, D): head after head, each its q, k and v. proj (D, k * d), fc1 (m, D), fc2 (D, m). No head or no
    channel: empty.
    """

    num_heads: int
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor


@dataclass(frozen=True)
class DynamicRules:
    """What a family says of its blocks.

    embedder: the submodule that makes the timestep embedding (B, D) of times (B,). sizes: of the blocks of an arch.
    masked: the block at full cost with masks multiplied in, for training and as a reference:
    (block, x, c, heads (B, H) or None, groups (B, H) or None, selection or None, token noise or None) -> (x, token mask or None).
    slices: (block, heads, groups) -> weights of these units, in this order, copied.
    prefix: (slices, number of heads, number of groups, sizes) -> their first units, views.
    sliced: (block, slices, x, c, selection or None, token mode) -> (x, number of tokens that the MLP saw, or as a tensor).
    scores: block -> importance of every head (H,) and of every hidden channel. reorder: permute both, in place, without a
    change of the function: (block, order of heads, order of hidden channels).
    """

    embedder: str
    sizes: Callable[[Any], BlockSizes]
    masked: Callable[..., tuple[Tensor, Tensor | None]]
    slices: Callable[[nn.Module, Tensor, Tensor, BlockSizes], BlockSlices]
    prefix: Callable[[BlockSlices, int, int, BlockSizes], BlockSlices]
    sliced: Callable[..., tuple[Tensor, Tensor | int]]
    scores: Callable[[nn.Module, BlockSizes], tuple[Tensor, Tensor]]
    reorder: Callable[[nn.Module, Tensor, Tensor, BlockSizes], None]


def bucket(count: int, limit: int, step: int = 128) -> int:
    """`count` rounded up to a multiple of `step`, at most `limit`."""
    return min(step * math.ceil(count / step), limit)
