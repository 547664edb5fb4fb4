"""Interleaved timing: every side in turn, in one process, on whatever device the sides work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tinyfusion.core.device import synchronise
from tinyfusion.core.progress import progress


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
        """Lower and upper quartile; of a single measurement itself, twice."""
        return _quartiles(self.measurements_ms)

    def per(self, num: int) -> Timing:
        """Time of one of `num` equal pieces of a measurement."""
        return Timing(tuple(ms / num for ms in self.measurements_ms))


def interleaved(
    sides: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, title: str | None = None
) -> dict[str, Timing]:
    """Time each side in turn, `repeats` times after one warm-up round each, in one process.

    device: where the sides work; an accelerator is synchronised before and after every measurement. title: of a progress line;
    None shows none.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    with progress(title or "", repeats * len(sides), "measurements", shown=title is not None) as bar:
        for call in sides.values():
            call()
        for done, (name, call) in enumerate([*sides.items()] * repeats):
            bar(done)  # checks for signals too
            synchronise(device)
            began = time.perf_counter()
            call()
            synchronise(device)
            times[name].append(1000 * (time.perf_counter() - began))
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
