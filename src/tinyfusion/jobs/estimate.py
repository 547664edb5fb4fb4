"""Cost of a job: bytes on one device, minutes and disk, as `--dry-run` prints them.

Weights, gradients, moments and averages follow from shapes, activations from what `jobs/footprint.py` measured. The memory plan
is arithmetic on these, so that other batch sizes, types and numbers of processes are known without running. Minutes come from a
measured piece of the work. Not counted: the program and its libraries, workspaces of kernels, what an allocator caches, start-up,
evaluation and the page.
"""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tinyfusion.blocks.stack import num_parameters
from tinyfusion.config.recipe import ComputeSection, SampleSection, TrainingSection
from tinyfusion.jobs.footprint import FLOAT_BYTES, Footprint, Measured
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import Sampler
from tinyfusion.sample.drive import sample as draw_samples
from tinyfusion.training.engine import cut
from tinyfusion.training.rounding import update_bytes

GIB = 2**30
CARDS_GIB = (24, 48, 80)  # memory of the cards for which the largest batch is shown
FREE_SHARE = 0.1  # of a card: for the program's own context, workspaces and the allocator's gaps
_HALF_BYTES = 2
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256  # smaller tensors have float32 moments; numbers that share a float32 constant
# of each number of a tensor: on a CPU, bitsandbytes expands moments and gradient to update it
_UPDATE_8BIT_CPU = 5 * FLOAT_BYTES
# of each number of a matrix: the momentum's step, and the products that make it orthogonal
_UPDATE_MUON = FLOAT_BYTES + 4 * _HALF_BYTES
_MOST_IMAGES = 2**21
_MEASURED_PARAMETERS = 200_000_000  # larger models are not run for an estimate, their operations are counted
_MEASURED_MACS = 5e9  # of one measured step: the batch is made smaller to stay below, and the time scaled
PASSING_VALUES = 12  # values per token and channel at once without a graph: an MLP's hidden layer, twice


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device at the peak of a step, by what takes them.

    images: at once on this process. overlap: gradients take the place of activations in the backward pass, so that
    "activations" is what these need in addition to the gradients.
    """

    sizes: Mapping[str, int]
    images: int
    dtype: str
    overlap: bool

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self.sizes.values())

    def lines(self) -> list[str]:
        """A human-readable table: everything that takes memory, with its share, and the sum."""
        named = {"activations": "activations beyond gradients"} if self.overlap else {}
        rows = [(named.get(name, name.replace("_", " ")), size) for name, size in self.sizes.items() if size]
        rows.append(("sum", self.total))
        wide, plural = max(len(name) for name, _ in rows), "image" if self.images == 1 else "images"
        lines = [f"memory of one process at its peak ({self.images:,} {plural} at once, {self.dtype}):"]
        for name, size in rows:
            unit, word = next(((u, w) for u, w in ((GIB, "GiB"), (2**20, "MiB")) if size >= u / 2), (2**10, "KiB"))
            share = 100 * size / max(self.total, 1)
            percent = "< 1 %" if share < 1 else f"{share:.0f} %"
            lines.append(f"  {name:{wide}}  {f'{size / unit:,.2f} {word}':>10}  {percent:>6}")
        return lines


def images_at_once(batch_size: int, world: int, compute: ComputeSection) -> int:
    """The largest microbatch of a global batch."""
    return max(num for _, num in cut(batch_size, world * compute.gradient_accumulation_steps))


def memory_plan(
    footprint: Footprint, settings: TrainingSection, compute: ComputeSection, world: int = 1, images: int | None = None
) -> MemoryPlan:
    """The plan of one of `world` processes. images: at once, instead of the batch size's share."""
    split = world > 1 and compute.parallel == "fsdp2"
    shares = world if split else 1
    images = images_at_once(settings.batch_size, world, compute) if images is None else images
    several = compute.gradient_accumulation_steps > 1
    lasting_gradients = several or (world > 1 and not split)  # DDP's buckets live on between steps
    own = [math.ceil(size / shares) for size in footprint.trained]
    item_bytes = footprint.item_bytes or [FLOAT_BYTES] * len(own)
    trained = sum(size * item for size, item in zip(own, item_bytes, strict=True))
    resident = settings.ema_device == "same" or footprint.on_host
    average = FLOAT_BYTES * sum(own) if settings.ema_decay and resident else 0
    linear_bytes = FLOAT_BYTES if settings.dtype == "float32" else _HALF_BYTES
    frozen = footprint.frozen_linear * linear_bytes + footprint.frozen_rest * FLOAT_BYTES
    gathered = 0
    if split:
        gathered = footprint.gathered + (footprint.teacher_gathered if compute.shard_teacher else 0)
        # all microbatches but the last have whole gradients
        gathered += FLOAT_BYTES * sum(footprint.trained) if several else 0
    measured = footprint.measured[settings.dtype]
    (activations, casts), (at_end, end_casts) = _moments(footprint, measured, images, compute.gradient_checkpointing)
    peak = activations + casts
    if not lasting_gradients:
        if peak <= trained + at_end + end_casts:
            peak, casts = trained + at_end + end_casts, end_casts
        peak -= trained
        casts = min(casts, peak)
    low = [size for size, item in zip(own, item_bytes, strict=True) if item < FLOAT_BYTES]
    update = update_bytes(low) if low else 0  # when the activations are gone
    if settings.optimizer == "adamw-8bit" and footprint.on_host:
        update += _UPDATE_8BIT_CPU * max((size for size in own if size >= _SMALLEST_8BIT), default=0)
    by_muon = {place for place, *_ in footprint.matrices}
    update += _UPDATE_MUON * max((footprint.trained[place] for place in by_muon), default=0)
    sizes = {
        "trained_weights": trained,
        "frozen_weights": math.ceil(frozen / shares),
        "gradients": trained,
        "optimizer": sum(
            FLOAT_BYTES * size if i in by_muon else _moment_bytes(size, settings.optimizer)
            for i, size in enumerate(own)
        ),
        "moving_average": average,
        "teacher": math.ceil(footprint.teacher / (shares if compute.shard_teacher else 1)),
        "model_also_resident": footprint.also_resident,
        "gathered_from_processes": gathered,
        "update_beyond_activations": max(update - peak, 0),
        "casts_of_weights": casts,
        "activations": peak - casts,
        "batches": images * compute.gradient_accumulation_steps * (compute.prefetch_batches + 1) * footprint.batch,
    }
    return MemoryPlan(sizes, images, settings.dtype, not lasting_gradients)


def _moments(
    footprint: Footprint, measured: Measured, images: int, checkpointing: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of (activations, casts of weights), without gradients: at their peak, and in the backward pass of one block."""
    blocks, graphed = measured.blocks, images * footprint.graph_share
    without_graph = [(images - graphed) * b.without_graph for b in blocks]  # of images that drop the block
    inside = [graphed * b.retained + max(graphed * b.transient, w) for b, w in zip(blocks, without_graph, strict=True)]
    casts, block_casts = sum(b.casts for b in blocks), max(b.casts for b in blocks)
    before, after = images * measured.before, images * measured.after
    if checkpointing:
        outputs = before + graphed * sum(b.output for b in blocks)
        again = graphed * max(b.retained + b.transient - b.output for b in blocks)  # the output is not made again
        passing = max(graphed, images - graphed) * max(b.without_graph for b in blocks)
        moments = [
            (outputs + passing, casts),  # autocast holds casts until the end of the forward pass
            (outputs + after, 0),
            (outputs + again, block_casts),  # then one block at a time is made again
        ]
    else:
        retained = [graphed * b.retained for b in blocks]
        extra = max(i - r for i, r in zip(inside, retained, strict=True))
        moments = [(before + after + sum(retained) + extra, casts)]
    if measured.teacher:  # runs before the student
        passing = images * max(b.without_graph + footprint.features * b.output for b in measured.teacher)
        moments.append((passing, footprint.passing + max(b.casts for b in measured.teacher)))
    activations, casts = max(moments, key=sum)
    return (math.ceil(activations), casts), (math.ceil(max(inside)), block_casts)


def _moment_bytes(size: int, optimizer: str) -> int:
    """Two moments per number: float32 with the tensor's step, or 8 bits with a float32 constant per block of numbers."""
    if optimizer == "adamw-8bit" and size >= _SMALLEST_8BIT:
        return 2 * (size + FLOAT_BYTES * math.ceil(size / _BLOCK_8BIT))
    return 2 * FLOAT_BYTES * size + FLOAT_BYTES


def fits(plan_of: Callable[[int], MemoryPlan], gib: float) -> int:
    """The largest number of images whose plan leaves `FREE_SHARE` of `gib` free; 0 where not even one does."""
    limit = (1 - FREE_SHARE) * gib * GIB
    return bisect_right(range(1, _MOST_IMAGES), limit, key=lambda images: plan_of(images).total)


def fitting_lines(
    footprint: Footprint, settings: TrainingSection, compute: ComputeSection, world: int = 1
) -> list[str]:
    """A human-readable table: how many images at once fit cards of usual sizes, by type and checkpointing."""
    on_card = footprint.teacher - footprint.hosted if footprint.on_host else footprint.teacher
    footprint = dataclasses.replace(footprint, on_host=False, teacher=on_card)
    lines = [
        f"images at once for which a card is large enough, {100 * FREE_SHARE:.0f} % of it left free:",
        f"  {'':32}" + "".join(f"{f'{gib} GiB':>14}" for gib in CARDS_GIB),
    ]
    for dtype in footprint.measured:
        changed = dataclasses.replace(settings, dtype=dtype)  # type: ignore[arg-type]  # a key of ours
        for checkpointing in (False, True):
            other = dataclasses.replace(compute, gradient_checkpointing=checkpointing)
            plan_of = partial(memory_plan, footprint, changed, other, world)
            numbers = [fits(plan_of, gib) for gib in CARDS_GIB]
            cells = "".join(f"{f'{number:,}' if number else 'does not fit':>14}" for number in numbers)
            lines.append(f"  {dtype + (', gradient checkpointing' if checkpointing else ''):32}{cells}")
    return [*lines, "  compute.gradient_accumulation_steps runs a larger batch in microbatches"]


@dataclass(frozen=True)
class Estimate:
    """Rounded numbers of a job. memory_gib: on the device, without the program itself. basis: source of the minutes.

    memory_plan: tables of the memory of a training, as lines to print.
    """

    minutes: float
    memory_gib: float
    disk_mib: float
    basis: str
    memory_plan: tuple[str, ...] = ()

    def __add__(self, other: Estimate) -> Estimate:
        """One job after the other."""
        minutes, memory_gib = self.minutes + other.minutes, max(self.memory_gib, other.memory_gib)
        lines = (*self.memory_plan, *other.memory_plan)
        return Estimate(minutes, memory_gib, self.disk_mib + other.disk_mib, self.basis, lines)


def sampling_estimate(model: LoadedModel, settings: SampleSection, sampler: Sampler, device: torch.device) -> Estimate:
    """Minutes and memory of drawing images."""
    arch, batch = model.arch, min(settings.batch_size, settings.num_images)
    rows, short = sampler.rows, sampler.of_steps(2)
    model.module.to(device)

    def measure(batch_size: int) -> float:
        labels = np.zeros(batch_size, dtype=np.int64)
        ends = [time.perf_counter()]
        for _ in range(2):
            last = list(draw_samples(model, labels, short, 0, batch_size))[-1]
            ends.append(time_after(float(last.x.flatten()[0])))
        return (ends[2] - ends[1]) / short.calls

    weights = num_parameters(model.module)
    seconds, basis = step_seconds(measure, rows * model.macs(), batch, weights, device)
    memory = FLOAT_BYTES * (weights + rows * batch * arch.num_tokens * arch.hidden_size * PASSING_VALUES)
    disk = settings.num_images * arch.in_channels * arch.input_size**2
    return rounded(seconds * sampler.calls * settings.num_images / batch, memory, disk, basis)


def announce(verb: str, plan: dict[str, Any], estimate: Estimate, spoken: bool = True) -> dict[str, Any]:
    """Print the plan of `verb` with its estimate (where `spoken`). Returns both as plain values, for `--json`."""

    def about(value: float) -> str:
        return "below 0.01" if value < 0.01 else f"about {value:,.2f}" if value < 10 else f"about {value:,.0f}"

    rows = {
        **plan,
        "minutes": f"{about(estimate.minutes)} ({estimate.basis})",
        "memory": f"{about(estimate.memory_gib)} GiB without the program itself",
        "disk": f"{about(estimate.disk_mib)} MiB",
    }
    lines = [f"{verb} would do this:", *(f"  {name:12} {value}" for name, value in rows.items())]
    for line in [*lines, *estimate.memory_plan] if spoken else ():
        print(line, flush=True)
    return {"plan": {**plan, **dataclasses.asdict(estimate)}}


def described(model: LoadedModel) -> str:
    """A model in a few words."""
    return f"{model.family.name}, {len(model.stack)} blocks, {num_parameters(model.module):,} parameters, {model.hash()[:12]}"


def step_seconds(
    measure: Callable[[int], float], macs_per_image: int, batch_size: int, parameters: int, device: torch.device,
    least: int = 1,
) -> tuple[float, str]:  # fmt: skip
    """Seconds of one step at `batch_size`, and their source. least: the fewest images of a step."""
    if parameters <= _MEASURED_PARAMETERS:
        measured = max(least, min(batch_size, int(_MEASURED_MACS / macs_per_image)))
        return measure(measured) * batch_size / measured, f"measured on two steps of {measured} images, {device.type}"
    side = 1024
    a = torch.ones(side, side, device=device)
    float((a @ a)[0, 0])
    began = time.perf_counter()
    rounds = 4
    for _ in range(rounds):
        a = a @ a / side
    rate = rounds * side**3 / (time_after(float(a[0, 0])) - began)
    return macs_per_image * batch_size / rate, f"from counted operations and a measured matrix product, {device.type}"


def muon_macs(footprint: Footprint) -> int:
    """Multiply-accumulates of the five Newton-Schulz steps of every matrix, once per step of a training."""
    sides = [sorted(shape) for _, *shape in footprint.matrices]
    return sum(5 * (2 * short * short * long + short**3) for short, long in sides)


def time_after(_: float) -> float:
    """The time after a value has arrived on the host, so all work before it is complete."""
    return time.perf_counter()


def rounded(
    seconds: float, memory_bytes: float, disk_bytes: float, basis: str, memory_plan: tuple[str, ...] = ()
) -> Estimate:
    """An estimate in minutes, GiB and MiB."""
    minutes, memory_gib, disk_mib = round(seconds / 60, 4), round(memory_bytes / 2**30, 4), round(disk_bytes / 2**20, 3)
    return Estimate(minutes, memory_gib, disk_mib, basis, memory_plan)
