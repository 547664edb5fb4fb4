"""Frozen linear layers in 8 or 4 bits, expanded whenever they multiply, one layer at a time, forward and backward.

Nothing of an expanded weight is retained for the backward pass, so low-rank updates train on packed layers, and a student may
stand on the layers of its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.training.optim import bitsandbytes_module

_LARGEST_FLOAT8 = 448.0
_BLOCK_4BIT = 64  # numbers that share a float32 scale


class PackedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is bytes; subclasses say how they become numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = (
            None
            if linear._parameters["bias"] is None
            else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        )
        self.register_parameter("bias", bias)
        self.weight = nn.Parameter(self.packed(linear.weight.detach()), requires_grad=False)

    def packed(self, weight: Tensor) -> Tensor:
        """uint8 of a weight (out, in), on its device."""
        raise NotImplementedError

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in autocast's type where that is on."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        out: Tensor = _Multiplied.apply(input.to(dtype), self)  # type: ignore[no-untyped-call]
        return out


class _Multiplied(torch.autograd.Function):
    """x W^T + b, without a copy of W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer._parameters["bias"] is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.expanded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (upstream,) = gradients
        return upstream @ ctx.layer.expanded(upstream.dtype), None


class Float8Linear(PackedLinear):
    """float8 (e4m3) times a power of two per tensor, so that numbers of bfloat16 and more hold the product exactly."""

    def packed(self, weight: Tensor) -> Tensor:
        """Bytes of float8, divided by the scale."""
        largest = float(weight.abs().amax()) if weight.numel() else 0.0
        self.scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_FLOAT8)) if 0 < largest < math.inf else 1.0
        return (weight.float() / self.scale).to(torch.float8_e4m3fn).view(torch.uint8)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The float8 numbers times the scale."""
        return self.weight.view(torch.float8_e4m3fn).to(dtype).mul_(self.scale)


class Nf4Linear(PackedLinear):
    """4-bit NormalFloat of bitsandbytes (arXiv 2305.14314), scaled per block of 64 numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight.quant_state = self.state  # type: ignore[attr-defined]  # as in bitsandbytes' own layers

    def packed(self, weight: Tensor) -> Tensor:
        """Two numbers a byte."""
        functional = _bitsandbytes()
        packed, self.state = functional.quantize_4bit(
            weight.contiguous(), blocksize=_BLOCK_4BIT, compress_statistics=False, quant_type="nf4"
        )
        return packed

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The numbers of the table times the scales."""
        whole: Tensor = _bitsandbytes().dequantize_4bit(self.weight, self.state)
        return whole.to(dtype)


def _bitsandbytes() -> Any:
    return bitsandbytes_module("functional", "weights in nf4 are those of bitsandbytes", "store them in float8")


PACKED: Mapping[str, type[PackedLinear]] = {"float8": Float8Linear, "nf4": Nf4Linear}


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers by name; not those of subclasses, which compute otherwise."""
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear:
            yield name, layer


@torch.no_grad()
def pack(blocks: BlockStack, kind: str, device: torch.device) -> None:
    """Replace the linear layers of frozen blocks by packed ones on `device`, in place, one at a time.

    What is in no block (embeddings, the head) stays as it is: it is a small share, and the most sensitive.
    """
    for block in blocks:
        for name, layer in list(linears(block)):
            block.set_submodule(name, PACKED[kind](layer.to(device)).train(layer.training))
        block.to(device)
