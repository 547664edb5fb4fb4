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


@lru_cache(maxsize=64)  # counting builds the model on the meta device
def macs_of_sizes(family_name: str, arch: Any) -> int:
    """Multiply-accumulates of one unguided forward pass of one image, of a registered family."""
    family = family_named(family_name)
    return count_macs(lambda: family.build(arch), lambda: family.example(arch, 1))


def count_macs(build: Callable[[], nn.Module], inputs: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Multiply-accumulates of one forward pass of `build()` on `inputs()`, counted on the meta device as `macs_by_module` does.

    The XL/2 model of arXiv 2212.09748 at 256 pixels is 118.69 G.
    """
    with torch.device("meta"), torch.no_grad():
        module = build().to("meta").eval()
        return macs_by_module(module, lambda: module(*inputs()))[""]


def macs_by_module(module: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Multiply-accumulates of `run()`, a forward pass of `module`, by the path of every submodule; "" is the whole.

    fvcore's convention: matrix products and convolutions, attention's two products, and 4 per element of a layer norm
    without affine parameters (5 with); other elementwise work is free.
    """

    def layer_norm(input_shape: Sequence[int], _shape: Any, weight: Any = None, *_: Any, **__: Any) -> int:
        return 2 * (4 if weight is None else 5) * math.prod(input_shape)

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: layer_norm})
    with torch.no_grad(), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run()
    root = type(module).__name__
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    paths = {name.removeprefix(root).removeprefix("."): each for name, each in flops.items() if name.startswith(root)}
    return {path: each // 2 for path, each in {**paths, "": flops["Global"]}.items()}
