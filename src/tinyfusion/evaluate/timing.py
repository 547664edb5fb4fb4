"""Interleaved timing: every side in turn, in one process, on whatever device the sides work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tinyfusion.core.device import synchronise
from tinyfusion.core.progress import Advance
from tinyfusion.core.signals import check_stop


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side of a comparison: every measurement, in order."""

    measurements_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.measurements_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The lower and the upper quartile; of a single measurement itself, twice."""
        return _quartiles(self.measurements_ms)

    def per(self, num: int) -> Timing:
        """The time of one of `num` equal pieces of a measurement."""
        return Timing(tuple(ms / num for ms in self.measurements_ms))


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    advance: Advance = lambda done, note="": None,
) -> dict[str, Timing]:
    """Time each side in turn, `repeats` times after one warm-up round each, in one process.

    device: where the sides work; an accelerator is synchronised before and after every measurement. advance: is given the
    number of calls so far, of (`repeats` + 1) per side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for done, call in enumerate(sides.values(), 1):
        call()
        advance(done)
    for repeat in range(1, repeats + 1):
        for done, (name, call) in enumerate(sides.items(), 1):
            check_stop()
            synchronise(device)
            began = time.perf_counter()
            call()
            synchronise(device)
            times[name].append(1000 * (time.perf_counter() - began))
            advance(repeat * len(sides) + done)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def speedup(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Ratio of medians, with the quartiles of the ratios of measurements made in the same round."""
    ratios = [a / b for a, b in zip(slow.measurements_ms, fast.measurements_ms, strict=True)]
    return slow.median_ms / fast.median_ms, *_quartiles(ratios)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
