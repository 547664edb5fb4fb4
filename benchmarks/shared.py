"""Shared by benchmarks and tests: models with random weights, peak memory, and statistics as text."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from tinyfusion.models.checkpoint import LoadedModel, new_model


def random_model(std: float, family: str = "dit", seed: int = 0, **sizes: int) -> LoadedModel:
    """A model whose trained weights are all random; published initial values make every block an identity."""
    model = new_model(family, sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std, generator=generator)
    return model


def xl_model(depth: int, width: int = 1152) -> LoadedModel:
    """A DiT-XL/2 with random weights at another depth."""
    sizes = dict(input_size=32, patch_size=2, in_channels=4, num_heads=16, num_classes=1000)
    return random_model(0.02, **sizes, hidden_size=width, depth=depth)


def memory_profile() -> profile:
    """A context that records allocations on the CPU, for `peak_bytes`."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def peak_bytes(recorded: profile) -> int:
    """Peak of allocated bytes within the context, above the state before it."""
    return int(max(_allocated(recorded)[1].max(initial=0), 0))


def live_bytes(recorded: profile, name: str) -> list[tuple[int, int]]:
    """(bytes at its begin, most bytes inside) of every `record_function(name)` in the context, above the state before it."""
    starts, live = _allocated(recorded)
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in _events(recorded) if e.name() == name]
    found = []
    for begin, end in sorted(spans):
        first, last = np.searchsorted(starts, (begin, end))
        before = int(live[first - 1]) if first else 0
        found.append((before, int(max(live[first:last].max(initial=before), before))))
    return found


def _allocated(recorded: profile) -> tuple[np.ndarray, np.ndarray]:
    """Time (ns) of every change of allocated bytes, and the bytes after it."""
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in _events(recorded) if e.name() == "[memory]"), key=itemgetter(0)
    )
    starts, sizes = np.array(changes, dtype=np.int64).reshape(-1, 2).T
    return starts, np.cumsum(sizes)


def _events(recorded: profile) -> list[Any]:
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return list(recorded.profiler.kineto_results.events())


def quartiles(values: Sequence[float], digits: int) -> str:
    """ "median (first quartile to third)"."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "mean ± standard deviation" (n - 1), nan of one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(head: Sequence[str], *rows: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
