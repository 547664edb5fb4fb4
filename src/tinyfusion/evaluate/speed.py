"""Multiply-accumulates counted from shapes, and interleaved timing."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinyfusion.core.signals import check_stop


def count_macs(build: Callable[[], nn.Module], inputs: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Multiply-accumulates of one forward pass of `build()` on `inputs()`, counted on the meta device.

    fvcore's convention: matrix products and convolutions, attention's two products, and 4 per element of a layer norm
    without affine parameters (5 with); other elementwise work is free. DiT-XL/2 at 256 pixels is 118.69 G.
    """

    def layer_norm(input_shape: Sequence[int], _shape: Any, weight: Any = None, *_: Any, **__: Any) -> int:
        return 2 * (4 if weight is None else 5) * math.prod(input_shape)

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: layer_norm})
    with torch.device("meta"), torch.no_grad():
        module = build().to("meta").eval()
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            module(*inputs())
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side of a comparison: every measurement, in order."""

    measurements_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        ordered = sorted(self.measurements_ms)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def interleaved(sides: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time each side in turn, `repeats` times after one warm-up round each, in one process run.

    device: where the sides work; one that queues its work is waited for before and after every measurement.
    """

    def synchronise() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    for call in sides.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            check_stop()
            synchronise()
            began = time.perf_counter()
            call()
            synchronise()
            found[name].append(1000 * (time.perf_counter() - began))
    return {name: Timing(tuple(values)) for name, values in found.items()}


def speedup(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Ratio of medians, with the quartiles of the ratios of measurements made side by side."""
    ratios = [a / b for a, b in zip(slow.measurements_ms, fast.measurements_ms, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return slow.median_ms / fast.median_ms, low, high
