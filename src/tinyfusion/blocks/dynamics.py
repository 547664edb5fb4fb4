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

from tinyfusion.blocks.packed import held_bytes, packed

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


class TokenLogits(Protocol):
    """What says, when only run, which tokens the MLP sees."""

    def logits(self, x: Tensor) -> Tensor:
        """x (B, N, D) after the attention -> (B, N) float32; a token is kept where its logit is above 0."""
        ...


class TokenSelection(TokenLogits, Protocol):
    """A module that says which tokens the MLP sees."""

    def __call__(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, N, D) after the attention, noise (B, N) in training -> mask (B, N) float32 of exactly 0 and 1."""
        ...


BUCKET = 128  # rows
UnitKind = Literal["heads", "groups"]


@dataclass(frozen=True)
class UnitSlices:
    """The layers of some units of a block, unit after unit, on copies of its weights or views of such a copy.

    number: of units, k. into: D -> k * rows, where a row of a head is one of its q, then k, then v. out: k * columns -> D, with
    the bias of the whole layer.
    """

    number: int
    into: nn.Module
    out: nn.Module

    def first(self, number: int) -> UnitSlices:
        """The first units; no copies."""
        assert isinstance(self.into, nn.Linear) and isinstance(self.out, nn.Linear)
        rows, columns = (
            size // max(1, self.number) * number for size in (len(self.into.weight), self.out.weight.shape[1])
        )
        into = linear_of(self.into.weight[:rows], self.into.bias[:rows])
        return UnitSlices(number, into, linear_of(self.out.weight[:, :columns], self.out.bias))

    def packed(self) -> UnitSlices:
        """The same layers as the processor reads them best; see `blocks/packed.py`."""
        return UnitSlices(self.number, packed(self.into), packed(self.out))

    @property
    def num_bytes(self) -> int:
        """Of its weights and biases."""
        return held_bytes(self.into) + held_bytes(self.out)


@dataclass(frozen=True)
class BlockSlices:
    """A sub-network of one block."""

    heads: UnitSlices
    groups: UnitSlices


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer on these tensors themselves, for running alone."""
    layer = nn.Linear(1, 1, device="meta")  # not of the size: torch warns where one is 0
    layer.out_features, layer.in_features = weight.shape
    layer.weight, layer.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))
    return layer


@dataclass(frozen=True)
class DynamicRules:
    """What a family says of its blocks.

    embedder: the submodule that makes the timestep embedding (B, D) of times (B,). labels: the one that makes the label
    embedding (B, D); their sum is what blocks are given. modulation: the submodule of a block that takes it, and whose result
    `sliced` is given. sizes: of the blocks of an arch.
    masked: the block at full cost with masks multiplied in, for training and as a reference:
    (block, x, c, heads (B, H) or None, groups (B, H) or None, selection or None, token noise or None) -> (x, token mask or None).
    slices: (block, kind, indices of units, sizes) -> these units, in this order, copied.
    sliced: (block, slices, x, modulation, token logits or None, token mode, form) -> (x, number of tokens that the MLP saw, or
    that as a tensor).
    scores: block -> importance of every head (H,) and of every hidden channel. reorder: permute both, in place, without a
    change of the function: (block, order of heads, order of hidden channels).
    """

    embedder: str
    labels: str
    modulation: str
    sizes: Callable[[Any], BlockSizes]
    masked: Callable[..., tuple[Tensor, Tensor | None]]
    slices: Callable[[nn.Module, UnitKind, Tensor, BlockSizes], UnitSlices]
    sliced: Callable[..., tuple[Tensor, Tensor | int]]
    scores: Callable[[nn.Module, BlockSizes], tuple[Tensor, Tensor]]
    reorder: Callable[[nn.Module, Tensor, Tensor, BlockSizes], None]


Form = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The form of a function that is the function itself."""
    return function


def bucket(count: int, limit: int, step: int = BUCKET) -> int:
    """`count` rounded up to a multiple of `step`, at most `limit`."""
    return min(step * math.ceil(count / step), limit)
