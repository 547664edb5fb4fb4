"""`bench`: measure denoising steps of one model, or of two interleaved, and a matrix product for comparison."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyfusion.blocks.packed import held_bytes
from tinyfusion.commands.sample_prompts import check_no_pipeline
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.compiler import check_compiler, compiling
from tinyfusion.core.rundir import machine
from tinyfusion.evaluate.timing import Timing, interleaved, speedup
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import SPREAD_STEPS, TimedModel, check_quantized, timed_model
from tinyfusion.jobs.typed import check_read
from tinyfusion.models.checkpoint import open_model
from tinyfusion.report.tables import scatters

_PRODUCT = "product"
_PRODUCT_SIZE = {"cpu": 2048}
_LARGE_PRODUCT = 8192


@dataclass(frozen=True)
class BenchModels:
    """Models as named, and sizes that official files lack."""

    model: str
    vs: str | None = None
    num_heads: int | None = None
    family: str | None = None
    num_classes: int | None = None


def bench(recipe: Recipe, names: BenchModels, dry_run: bool = False) -> dict[str, Any]:
    """Print and return steps per second, latency, memory, multiply-accumulates and achieved arithmetic of each model.

    Raises UserError on settings that do not fit a model.
    """
    settings, device = recipe.bench, device_for(recipe)
    check_no_pipeline(recipe, names.model)
    if settings.compile:
        check_compiler(device)
    sources = {"model": names.model} | ({"vs": names.vs} if names.vs else {})
    typed = names.num_heads, names.family, names.num_classes
    models = {side: open_model(source, recipe.sample.weights, *typed) for side, source in sources.items()}
    check_read("bench", recipe, *models.values())
    for model in models.values():
        sampler_of(recipe.sample, model)  # raises, also in a dry run
        check_quantized(model, settings.quantize, settings.dtype, settings.compile, device)
    hashes = {side: model.hash() for side, model in models.items()}
    spread = any(model.dynamic is not None for model in models.values())
    protocol = _protocol(recipe, device, spread, not all(model.takes_guidance for model in models.values()))
    if dry_run:
        print(f"bench would measure {' and '.join(sources.values())}: {protocol}")
        return {"state": "checked", "protocol": protocol}
    steps = SPREAD_STEPS if spread else None
    arithmetic = (settings.dtype, settings.compile, settings.quantize)
    how = (recipe.sample, settings.batch_size, device, steps, recipe.seed, *arithmetic)
    timed = {name: timed_model(model, *how) for name, model in models.items()}
    sides = {name: _side(side, sources[name], hashes[name]) for name, side in timed.items()}
    with ExitStack() as around:
        for side in timed.values() if settings.compile else ():
            around.enter_context(side.model.stack.compiled())
        return measured(sides, recipe, settings.batch_size, settings.dtype, device, protocol)


@dataclass(frozen=True)
class BenchSide:
    """A model of a comparison. One call of `run` makes `steps` denoising steps of a batch.

    macs, weight_bytes: of a forward pass of one image, and of all weights, after a run. rows: of the network's batch per image.
    calls: steps of a whole drawing; None where it is not known.
    """

    source: str
    hash: str
    depth: int
    num_parameters: int
    rows: int
    steps: int
    run: Callable[[], object]
    macs: Callable[[], float]
    weight_bytes: Callable[[], int]
    calls: int | None = None


def _side(side: TimedModel, source: str, hash: str) -> BenchSide:
    def weight_bytes() -> int:
        ran = side.skipped.report()
        return held_bytes(side.model.module) + (ran["extra_bytes"] if ran else 0)

    facts = (source, hash, len(side.model.stack), side.num_parameters, side.rows, side.steps)
    return BenchSide(*facts, side.run, lambda: side.macs, weight_bytes, side.calls)


def measured(
    sides: Mapping[str, BenchSide], recipe: Recipe, batch_size: int, dtype: str, device: torch.device, protocol: str
) -> dict[str, Any]:
    """Time the sides in turns with a matrix product of this type, and print and return the outcome."""
    settings = recipe.bench
    size = settings.product_size or _PRODUCT_SIZE.get(device.type, _LARGE_PRODUCT)
    a, b = (torch.full((size, size), 1 / size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    peaks = {name: _warmed(side, device) for name, side in sides.items()}
    calls = {**{name: side.run for name, side in sides.items()}, _PRODUCT: lambda: a @ b}
    times = interleaved(calls, settings.repeats, device, "bench")
    rate = size**3 / (times.pop(_PRODUCT).median_ms / 1000)
    times = {name: timing.per(sides[name].steps) for name, timing in times.items()}
    outcome: dict[str, Any] = {"protocol": protocol, "machine": machine(), "product_macs_per_s": rate, "models": {}}
    for name, side in sides.items():
        numbers = _numbers(side, times[name], batch_size, rate)
        outcome["models"][name] = {"source": side.source, "hash": side.hash, **numbers, "peak_bytes": peaks[name]}
    if "vs" in sides:
        ratio, low, high = speedup(times["vs"], times["model"])
        counted = sides["vs"].macs() * sides["vs"].rows / (sides["model"].macs() * sides["model"].rows)
        outcome["speedup"] = {"ratio": ratio, "spread": [low, high], "macs_ratio": counted, "share": ratio / counted}
        if sides["vs"].calls and sides["model"].calls:
            outcome["drawing_speedup"] = ratio * sides["vs"].calls / sides["model"].calls
    _print(outcome)
    return outcome


def _protocol(recipe: Recipe, device: torch.device, spread: bool, folded: bool) -> str:
    """Everything that the numbers depend on except the models and the machine."""
    settings = recipe.bench
    where = place_of(device)
    over = f", mean of {SPREAD_STEPS} over the chain," if spread else ""
    rows = 2 if recipe.sample.guidance > 1 else 1
    guidance = f"guidance {recipe.sample.guidance:g} ({rows} row{'s' * (rows > 1)} per image"
    guidance += f"{', of a model drawn without 1' if folded and rows > 1 else ''})"
    return (
        f"one denoising step{over} of {settings.batch_size} image{'s' * (settings.batch_size > 1)}, {guidance}, "
        f"{settings.quantize or settings.dtype}{' compiled' if settings.compile else ''}, {where}, torch {torch.__version__}; "
        f"medians of {settings.repeats}, interleaved with each other and a matrix product"
    )


def place_of(device: torch.device) -> str:
    """The device in words, a CPU with its threads."""
    threads = torch.get_num_threads()
    cpu = f"cpu, {threads} thread{'s' * (threads > 1)}"
    return cpu if device.type == "cpu" else torch.cuda.get_device_name(device)


def _warmed(side: BenchSide, device: torch.device) -> int | None:
    """Run a step twice, compiled if so set. Returns the memory of the second, with the weights; None where unknown."""
    with compiling(side.source):
        side.run()
    weights = side.weight_bytes()
    with _peak(device) as peak:
        side.run()
    return None if not peak else weights + peak[0]


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """A list that gets the largest rise of memory within the context in bytes, and stays empty where it is unknown.

    On a CPU it is the resident memory of the process, after freed memory was returned to the system.
    """
    peak: list[int] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or sys.platform != "linux" or not reset.exists():
        yield peak
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5", encoding="ascii")  # resets the high-water mark
    resident = _status("VmRSS")
    yield peak
    peak.append(max(0, _status("VmHWM") - resident))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def _numbers(side: BenchSide, timing: Timing, batch_size: int, rate: float) -> dict[str, Any]:
    """latency_ms: of a step of the batch, median and quartiles. macs: of an unguided forward pass of one image."""
    seconds, macs = timing.median_ms / 1000, side.macs() * side.rows * batch_size
    return {
        "depth": side.depth,
        "num_parameters": side.num_parameters,
        "macs": side.macs(),
        "latency_ms": timing.median_ms,
        "latency_ms_spread": list(timing.quartiles_ms),
        "steps_per_s": 1 / seconds,
        "image_steps_per_s": batch_size / seconds,
        "macs_per_s": macs / seconds,
        "share_of_product": macs / seconds / rate,
        **({} if side.calls is None else {"passes_per_image": side.calls * side.rows}),
    }


def _print(outcome: dict[str, Any]) -> None:
    print(outcome["protocol"])
    models = list(outcome["models"].values())
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda m: str(m["source"]),
        "blocks": lambda m: str(m["depth"]),
        "parameters": lambda m: f"{m['num_parameters']:,}",
        "MACs per image": lambda m: f"{m['macs'] / 1e9:,.3f} G",
        "latency": lambda m: "{:,.4g} ms ({:,.4g} to {:,.4g})".format(m["latency_ms"], *m["latency_ms_spread"]),
        "steps per second": lambda m: f"{m['steps_per_s']:,.4g}",
        "passes per image": lambda m: f"{m['passes_per_image']:,}" if "passes_per_image" in m else "not known",
        "peak memory": lambda m: "not known" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f} MiB",
        "arithmetic": lambda m: f"{m['macs_per_s'] / 1e9:,.4g} GMAC/s, {m['share_of_product']:.1%} of the product",
    }
    rows = {name: [cell(model) for model in models] for name, cell in cells.items()}
    width = max(len(text) for texts in rows.values() for text in texts)
    for name, texts in rows.items():
        if set(texts) == {"not known"}:
            continue
        print(f"  {name:18}" + "  ".join(f"{text:{width}}" for text in texts).rstrip())
    print(f"  {'matrix product':18}{outcome['product_macs_per_s'] / 1e9:,.4g} GMAC/s")
    if "speedup" in outcome:
        ratio = outcome["speedup"]
        low, high = ratio["spread"]
        print(
            f"  {'speed-up':18}{ratio['ratio']:.3f} ({low:.3f} to {high:.3f}) for {ratio['macs_ratio']:.3f} times fewer MACs: "
            f"{ratio['share']:.1%} of them"
        )
    if (drawing := outcome.get("drawing_speedup")) and len({model["passes_per_image"] for model in models}) > 1:
        print(f"  {'of a drawing':18}{drawing:.3f}")
    unsteady = [str(m["source"]) for m in models if scatters(m["latency_ms_spread"], m["latency_ms"])]
    if unsteady:
        print(f"  the times of {' and '.join(unsteady)} scatter: this machine is busy, measure again when it is idle")
