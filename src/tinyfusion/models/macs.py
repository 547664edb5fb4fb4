"""Multiply-accumulates of a forward pass, counted from shapes on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinyfusion.families.registry import family_named
from tinyfusion.models.loaded import LoadedModel


def model_macs(model: LoadedModel) -> int:
    """Multiply-accumulates of one unguided forward pass of one image."""
    return _macs(model.family.name, model.arch)


@lru_cache(maxsize=64)  # counting builds the model on the meta device
def _macs(family_name: str, arch: Any) -> int:
    family = family_named(family_name)
    return count_macs(lambda: family.build(arch), lambda: family.example(arch, 1))


def count_macs(build: Callable[[], nn.Module], inputs: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Multiply-accumulates of one forward pass of `build()` on `inputs()`, counted on the meta device.

    fvcore's convention: matrix products and convolutions, attention's two products, and 4 per element of a layer norm
    without affine parameters (5 with); other elementwise work is free. The XL/2 model of arXiv 2212.09748 at 256
    pixels is 118.69 G.
    """

    def layer_norm(input_shape: Sequence[int], _shape: Any, weight: Any = None, *_: Any, **__: Any) -> int:
        return 2 * (4 if weight is None else 5) * math.prod(input_shape)

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: layer_norm})
    with torch.device("meta"), torch.no_grad():
        module = build().to("meta").eval()
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            module(*inputs())
    return counter.get_total_flops() // 2
