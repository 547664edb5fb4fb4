"""Cost of a job, for `--dry-run`: memory and disk from shapes, minutes from a measured piece of the work.

Not counted: start-up, the program itself, evaluation and the page (seconds).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinyfusion.blocks.stack import num_parameters
from tinyfusion.config.recipe import SampleSection
from tinyfusion.jobs.footprint import FLOAT_BYTES
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.macs import model_macs
from tinyfusion.sample.drive import Sampler
from tinyfusion.sample.drive import sample as draw_samples

_MEASURED_PARAMETERS = 200_000_000  # larger models are not run for an estimate, their operations are counted
_MEASURED_MACS = 5e9  # of one measured step: the batch is made smaller to stay below, and the time scaled
PASSING_VALUES = 12  # values per token and channel at once without a graph: an MLP's hidden layer, twice


@dataclass(frozen=True)
class Estimate:
    """Rounded numbers of a job. memory_gib: on the device, without the program itself. basis: source of the minutes.

    memory_plan: tables of the memory of a training, as lines for people.
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
    seconds, basis = step_seconds(measure, rows * model_macs(model), batch, weights, device)
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


def time_after(_: float) -> float:
    """The time after a value has arrived on the host, so all work before it is complete."""
    return time.perf_counter()


def rounded(
    seconds: float, memory_bytes: float, disk_bytes: float, basis: str, memory_plan: tuple[str, ...] = ()
) -> Estimate:
    """An estimate in minutes, GiB and MiB."""
    minutes, memory_gib, disk_mib = round(seconds / 60, 4), round(memory_bytes / 2**30, 4), round(disk_bytes / 2**20, 3)
    return Estimate(minutes, memory_gib, disk_mib, basis, memory_plan)
