"""Batches of seeds to images: image i is the same whatever the batch size.

Shapes: B images of a batch, C channels, S input side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tinyfusion.core.recipe import Sampler
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import Denoiser, Schedule, StepNoise, kept_timesteps, sample_ancestral, sample_ddim
from tinyfusion.processes.solvers import SOLVERS, check_steps, sample_solver
from tinyfusion.sample.guidance import WHOLE, guided


@dataclass(frozen=True)
class SamplerSettings:
    """How a trajectory is made.

    guidance: scale, 1 or more; 1 runs the conditional model alone. guided: noise channels under guidance, the family's
    published ones or all. eta: DDIM's share of fresh noise, 0 to 1. clip: of ddpm and ddim. interval: shares of the
    timesteps, 0 to 1, between which there is guidance. Raises ValueError on anything else, and on a number of steps that
    the sampler's rule cannot give.
    """

    sampler: Sampler = "ddpm"
    num_steps: int = 250
    guidance: float = 1.5
    guided: Literal["published", "all"] = "published"
    eta: float = 0.0
    clip: bool = False
    interval: tuple[float, float] = WHOLE

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1 (1 runs the conditional model alone); got {self.guidance:g}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta:g}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"a guidance interval is two rising shares in [0, 1]; got {low:g} and {high:g}")
        if self.sampler in SOLVERS:
            if self.clip:
                raise ValueError(f"clip is for ddpm and ddim: {self.sampler} takes several steps together")
            check_steps(self.num_steps)
        else:
            kept_timesteps(self.spacing)

    @property
    def spacing(self) -> str:
        """The respacing string of ddpm (even sections) and ddim (the stride rule)."""
        return str(self.num_steps) if self.sampler == "ddpm" else f"ddim{self.num_steps}"

    def trajectory(self, denoiser: Denoiser, x: Tensor, step_noise: StepNoise) -> Iterator[Tensor]:
        """x after every step, from x ~ N(0, 1)."""
        if self.sampler in SOLVERS:
            return sample_solver(denoiser, self.sampler, self.num_steps, x)
        schedule = Schedule(self.spacing)
        if self.sampler == "ddpm":
            return sample_ancestral(denoiser, schedule, x, step_noise, self.clip)
        return sample_ddim(denoiser, schedule, x, step_noise, self.clip, self.eta)

    def guided_channels(self, model: LoadedModel) -> int:
        """Leading noise channels of `model` under guidance."""
        channels = int(model.arch.in_channels)
        published = model.family.guided_channels
        return channels if self.guided == "all" or published is None else min(published, channels)


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples `first ..`: x (B, C, S, S) in the model's own space, labels (B,)."""

    first: int
    x: Tensor
    labels: Tensor


def image_labels(
    num_images: int, num_classes: int, seed: int, classes: Sequence[int] = (), balanced: bool = False
) -> np.ndarray:
    """(num_images,) int64: the given classes in turn, else 0, 1, 2, ... in turn if `balanced`, else uniform by image index."""
    if classes or balanced:
        listed = np.array(classes if classes else range(num_classes), dtype=np.int64)
        return listed[np.arange(num_images) % len(listed)]
    return Randomness(seed).at(0, 0, num_images).integers("sample-label", num_classes)


@torch.no_grad()
def sample(
    model: LoadedModel,
    labels: Sequence[int] | np.ndarray,
    settings: SamplerSettings,
    seed: int,
    batch_size: int = 64,
    first: int = 0,
    last: int | None = None,
) -> Iterator[SampleBatch]:
    """Draw images `first .. last - 1` of those that `labels` (all of them, by image index) name, a batch at a time.

    Runs where the model is, in the type of its weights; everything but the model is float32. Initial and step noise are
    addressed by (seed, step, image index).
    """
    labels = np.asarray(labels, dtype=np.int64)[:last]
    arch = model.arch
    shape = (arch.in_channels, arch.input_size, arch.input_size)
    channels = settings.guided_channels(model)
    device = next(model.module.parameters()).device
    randomness = Randomness(seed)
    for start in range(first, len(labels), batch_size):
        num = min(batch_size, len(labels) - start)
        y = torch.from_numpy(labels[start : start + num]).to(device)
        denoiser = guided(model.module, y, arch.num_classes, settings.guidance, channels, settings.interval)

        def step_noise(position: int, start: int = start, num: int = num) -> Tensor:
            return torch.from_numpy(randomness.at(position + 1, start, num).normal("sample-noise", shape)).to(device)

        trajectory = settings.trajectory(denoiser, step_noise(-1), step_noise)
        yield SampleBatch(start, deque(trajectory, maxlen=1).pop(), y)


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, C, S, S) in [-1, 1] -> uint8 (B, S, S, C): trunc(clamp(127.5 x + 128, 0, 255)), the published rule."""
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
