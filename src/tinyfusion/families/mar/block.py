"""The transformer block of MAR, with dropout that is addressed: what is dropped depends on seeds that come with the call.

Framework dropout draws from a global generator, so it would depend on the batch, the device and what was drawn before.
Shapes: B images, T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.blocks.packed import gelu_linear

MLP_RATIO = 4
NORM_EPS = 1e-6


class BlockDropout(NamedTuple):
    """Dropout of one block: seeds (B,) int64, one per image, and the share that is dropped of attention weights, and of
    what the attention projection and both layers of the MLP give.
    """

    seeds: Tensor
    attention: float
    projection: float


def _mixed_bits(x: Tensor) -> Tensor:
    """Numbers of 32 bits, stored as int64, to others that look random (the finaliser of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def block_seeds(seeds: Tensor, block: int) -> Tensor:
    """Seeds (B,) of the images to those of one block."""
    return _mixed_bits(
        (seeds & 0xFFFFFFFF) ^ _mixed_bits((seeds >> 32) & 0xFFFFFFFF) ^ (block * 0x9E3779B9 & 0xFFFFFFFF)
    )


def dropped_out(x: Tensor, seeds: Tensor, rate: float, place: int) -> Tensor:
    """x (B, ...) with values set to 0 with probability `rate` and the others scaled up.

    Which ones depends on the seed of the image, the `place` in the block and the position inside the image alone, so not
    on the batch, the device or what was drawn before.
    """
    if rate == 0:
        return x
    position = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    own = _mixed_bits(seeds ^ (place * 0x7FEB352D & 0xFFFFFFFF)).view(-1, *([1] * (x.ndim - 1)))
    kept = _mixed_bits(_mixed_bits(position) ^ own) >= int(rate * 2**32)
    return x * kept.to(x.dtype) / (1 - rate)


class MarAttention(nn.Module):
    """Multi-head self-attention over all tokens, one fused projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, dropout: BlockDropout | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if dropout is None or dropout.attention == 0:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # no fused kernel takes a mask for the weights
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
            mixed = dropped_out(weights, dropout.seeds, dropout.attention, 0).to(v.dtype) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out if dropout is None else dropped_out(out, dropout.seeds, dropout.projection, 1)


class MarMlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, dropout: BlockDropout | None = None) -> Tensor:
        inner = gelu_linear(self.fc1, x, "none")
        if dropout is None:
            return self.fc2(inner)
        outer = self.fc2(dropped_out(inner, dropout.seeds, dropout.projection, 2))
        return dropped_out(outer, dropout.seeds, dropout.projection, 3)


class MarBlock(nn.Module):
    """Pre-norm transformer block without conditioning: x (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = MarAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MarMlp(width)

    def forward(self, x: Tensor, dropout: BlockDropout | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), dropout)
        return x + self.mlp(self.norm2(x), dropout)


class Dropout(NamedTuple):
    """Dropout of a whole model: seeds (B,) int64, one per image; the shares as in `BlockDropout`. In training mode alone."""

    seeds: Tensor
    attention: float
    projection: float

    def of(self, block: int) -> BlockDropout:
        """For block number `block`, counted through both stacks."""
        return BlockDropout(block_seeds(self.seeds, block), self.attention, self.projection)
