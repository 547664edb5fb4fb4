"""`bench`: how fast a model denoises here, beside what this machine can multiply. Two models are measured in turns."""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.blocks.packed import held_bytes
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.compiler import check_compiler, compiling
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import machine
from tinyfusion.evaluate.timing import Timing, interleaved, speedup
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import in_dtype
from tinyfusion.jobs.skipped_model import SkippedModel, skipped_run_for
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.models.macs import model_macs
from tinyfusion.report.facts import scatters
from tinyfusion.sample.drive import SampleDraws

_PRODUCT = "product"
_PRODUCT_SIZE = {"cpu": 2048}
_LARGE_PRODUCT = 8192
SPREAD_STEPS = 10  # of a trajectory that is timed where steps differ


@dataclass(frozen=True)
class BenchModels:
    """Models as named, and what an official file does not say."""

    model: str
    vs: str | None = None
    num_heads: int | None = None
    family: str | None = None
    num_classes: int | None = None


@dataclass
class _Side:
    """One measured model. step: one denoising step of a batch. rows: that its forward pass has per image."""

    model: LoadedModel
    num_parameters: int
    macs: int
    rows: int
    step: Callable[[], Tensor]
    steps: int = 1
    skipped: SkippedModel | None = None
    peak_bytes: int | None = None

    @property
    def macs_run(self) -> float:
        """Of one forward pass of one image: all, or what sub-networks ran on average so far."""
        return self.skipped.macs_run(self.macs) if self.skipped else self.macs


def bench(recipe: Recipe, names: BenchModels, dry_run: bool = False) -> dict[str, Any]:
    """Print and return steps per second, latency, memory, multiply-accumulates and achieved arithmetic of each model.

    Weights may be any; the images that come out are thrown away. Raises UserError on settings that cannot be.
    """
    settings, device = recipe.bench, device_for(recipe)
    _check(recipe)
    if settings.compile:
        check_compiler(device)
    sources = {"model": names.model} | ({"vs": names.vs} if names.vs else {})
    said = names.num_heads, names.family, names.num_classes
    models = {side: open_model(source, recipe.sample.weights, *said) for side, source in sources.items()}
    for model in models.values():
        sampler_of(recipe.sample, model)  # a dry run too refuses what cannot be sampled so
    hashes = {side: model.hash() for side, model in models.items()}
    protocol = _protocol(recipe, device, any(model.dynamic is not None for model in models.values()))
    if dry_run:
        print(f"bench would measure {' and '.join(sources.values())}: {protocol}")
        return {"state": "checked", "protocol": protocol}
    spread = any(model.dynamic is not None for model in models.values())
    sides = {name: _side(recipe, model, device, spread) for name, model in models.items()}
    size = settings.product_size or _PRODUCT_SIZE.get(device.type, _LARGE_PRODUCT)
    product = _product(size, settings.dtype, device)
    with torch.inference_mode(), ExitStack() as around:
        if settings.compile:
            for side in sides.values():
                around.enter_context(side.model.stack.compiled())
        for name, side in sides.items():
            side.peak_bytes = _warmed(side, f"{sources[name]}", device)
        calls: dict[str, Callable[[], object]] = {name: side.step for name, side in sides.items()}
        calls[_PRODUCT] = product
        times = interleaved(calls, settings.repeats, device)
    for name, side in sides.items():
        times[name] = Timing(tuple(ms / side.steps for ms in times[name].measurements_ms))
    rate = size**3 / (times[_PRODUCT].median_ms / 1000)
    outcome: dict[str, Any] = {
        "protocol": protocol,
        "machine": machine(),
        "product_macs_per_s": rate,
        "models": {
            name: {
                "source": sources[name],
                "hash": hashes[name],
                **_numbers(side, times[name], settings.batch_size, rate),
            }
            for name, side in sides.items()
        },
    }
    if "vs" in sides:
        ratio, low, high = speedup(times["vs"], times["model"])
        counted = sides["vs"].macs_run * sides["vs"].rows / (sides["model"].macs_run * sides["model"].rows)
        outcome["speedup"] = {"ratio": ratio, "spread": [low, high], "macs_ratio": counted, "share": ratio / counted}
    _print(outcome)
    return outcome


def _check(recipe: Recipe) -> None:
    """UserError on numbers that measure nothing."""
    settings = recipe.bench
    for name in ("batch_size", "repeats"):
        if getattr(settings, name) < 1:
            raise UserError(f"bench.{name} is at least 1; got {getattr(settings, name)}")
    if settings.product_size is not None and settings.product_size < 64:
        raise UserError(
            f"bench.product_size is at least 64, smaller products measure calls; got {settings.product_size}"
        )


def _protocol(recipe: Recipe, device: torch.device, spread: bool) -> str:
    """All that the numbers depend on but the models and the machine."""
    settings, threads = recipe.bench, torch.get_num_threads()
    where = (
        f"cpu, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )
    over = f", mean of {SPREAD_STEPS} over the chain," if spread else ""
    guidance = f"guidance {recipe.sample.guidance:g} ({2 if recipe.sample.guidance > 1 else 1} rows per image)"
    return (
        f"one denoising step{over} of {settings.batch_size} image{'s' * (settings.batch_size > 1)}, {guidance}, "
        f"{settings.dtype}{' compiled' if settings.compile else ''}, {where}, torch {torch.__version__}; "
        f"medians of {settings.repeats}, interleaved with each other and a matrix product"
    )


def _side(recipe: Recipe, model: LoadedModel, device: torch.device, spread: bool) -> _Side:
    """spread: time steps of all levels of noise, because what a model with routers runs depends on it."""
    settings, arch = recipe.bench, model.arch
    sampler, macs, size = sampler_of(recipe.sample, model), model_macs(model), num_parameters(model.module)
    short = sampler.of_steps(SPREAD_STEPS)
    skipping = skipped_run_for(model, short)  # before any cast
    placed = in_dtype(model, settings.dtype, device)
    labels = torch.from_numpy(np.arange(settings.batch_size, dtype=np.int64) % arch.num_classes).to(device)
    draws = SampleDraws(Randomness(recipe.seed), 0, settings.batch_size, device)
    if not spread:
        return _Side(placed, size, macs, sampler.rows, sampler.one_step(placed, labels, draws))
    skipped = SkippedModel(placed, skipping, settings.compile)

    def trajectory() -> Tensor:
        with skipped.running():
            return deque(short.trajectory(placed, labels, draws), maxlen=1).pop()

    return _Side(placed, size, macs, sampler.rows, trajectory, short.calls, skipped)


def _product(size: int, dtype: str, device: torch.device) -> Callable[[], Tensor]:
    """One matrix product of `size` rows and columns in the type of the models."""
    a, b = (torch.full((size, size), 1 / size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    return lambda: a @ b


def _warmed(side: _Side, name: str, device: torch.device) -> int | None:
    """Run a step twice, compiling where that is asked for; the memory that the second took, with the weights."""
    with compiling(name):
        side.step()
    told = side.skipped.report() if side.skipped else None
    weights = held_bytes(side.model.module) + (told["extra_bytes"] if told else 0)
    with _peak(device) as peak:
        side.step()
    return None if not peak else weights + peak[0]


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Within: the list then holds the bytes by which memory rose at most. It stays empty where this system does not say.

    On a CPU it is the resident memory of the process, once freed memory has been given back to the system.
    """
    found: list[int] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or sys.platform != "linux" or not reset.exists():
        yield found
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5", encoding="ascii")  # the highest mark begins anew
    held = _status("VmRSS")
    yield found
    found.append(max(0, _status("VmHWM") - held))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def _numbers(side: _Side, timing: Timing, batch_size: int, rate: float) -> dict[str, Any]:
    """latency_ms: of a step of the batch, median and quartiles. macs: of an unguided forward pass of one image."""
    seconds, macs = timing.median_ms / 1000, side.macs_run * side.rows * batch_size
    measured = timing.measurements_ms
    low, _, high = statistics.quantiles(measured, n=4, method="inclusive") if len(measured) > 1 else measured * 3
    return {
        "depth": len(side.model.stack),
        "num_parameters": side.num_parameters,
        "macs": side.macs_run,
        "latency_ms": timing.median_ms,
        "latency_ms_spread": [low, high],
        "steps_per_s": 1 / seconds,
        "image_steps_per_s": batch_size / seconds,
        "macs_per_s": macs / seconds,
        "share_of_product": macs / seconds / rate,
        "peak_bytes": side.peak_bytes,
    }


def _print(outcome: dict[str, Any]) -> None:
    """The numbers for people; the protocol beside them."""
    print(outcome["protocol"])
    rows = {
        "model": [str(m["source"]) for m in outcome["models"].values()],
        "blocks": [str(m["depth"]) for m in outcome["models"].values()],
        "parameters": [f"{m['num_parameters']:,}" for m in outcome["models"].values()],
        "MACs per image": [f"{m['macs'] / 1e9:,.3f} G" for m in outcome["models"].values()],
        "latency": [
            f"{m['latency_ms']:,.4g} ms ({m['latency_ms_spread'][0]:,.4g} to {m['latency_ms_spread'][1]:,.4g})"
            for m in outcome["models"].values()
        ],
        "steps per second": [f"{m['steps_per_s']:,.4g}" for m in outcome["models"].values()],
        "peak memory": [
            "not known" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f} MiB"
            for m in outcome["models"].values()
        ],
        "arithmetic": [
            f"{m['macs_per_s'] / 1e9:,.4g} GMAC/s, {m['share_of_product']:.1%} of the product"
            for m in outcome["models"].values()
        ],
    }
    width = max(len(cell) for cells in rows.values() for cell in cells)
    for name, cells in rows.items():
        print(f"  {name:18}" + "  ".join(f"{cell:{width}}" for cell in cells).rstrip())
    print(f"  {'matrix product':18}{outcome['product_macs_per_s'] / 1e9:,.4g} GMAC/s")
    if "speedup" in outcome:
        ratio = outcome["speedup"]
        low, high = ratio["spread"]
        print(
            f"  {'speed-up':18}{ratio['ratio']:.3f} ({low:.3f} to {high:.3f}) for {ratio['macs_ratio']:.3f} times fewer MACs: "
            f"{ratio['share']:.1%} of them"
        )
    unsteady = [
        str(m["source"]) for m in outcome["models"].values() if scatters(m["latency_ms_spread"], m["latency_ms"])
    ]
    if unsteady:
        print(f"  the times of {' and '.join(unsteady)} scatter: this machine is busy, measure again when it is idle")
