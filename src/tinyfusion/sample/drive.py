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

from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import Schedule, kept_timesteps, sample_ancestral, sample_ddim
from tinyfusion.sample.guidance import guided


@dataclass(frozen=True)
class SamplerSettings:
    """How a trajectory is made.

    guidance: scale, 1 or more; 1 runs the conditional model alone. guided: noise channels under guidance, the family's
    published ones or all. eta: DDIM's share of fresh noise, 0 to 1. Raises ValueError on anything else, and on a number
    of steps that the sampler's rule cannot give.
    """

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    num_steps: int = 250
    guidance: float = 1.5
    guided: Literal["published", "all"] = "published"
    eta: float = 0.0
    clip: bool = False

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1 (1 runs the conditional model alone); got {self.guidance:g}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta:g}")
        kept_timesteps(self.spacing)

    @property
    def spacing(self) -> str:
        """The respacing string: even sections for ddpm, the stride rule for ddim."""
        return str(self.num_steps) if self.sampler == "ddpm" else f"ddim{self.num_steps}"

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
) -> Iterator[SampleBatch]:
    """Draw images `first ..` of those that `labels` (all of them, by image index) name, a batch at a time.

    Runs where the model is. Initial and step noise are addressed by (seed, step, image index).
    """
    labels = np.asarray(labels, dtype=np.int64)
    schedule, arch = Schedule(settings.spacing), model.arch
    shape = (arch.in_channels, arch.input_size, arch.input_size)
    channels = settings.guided_channels(model)
    device = next(model.module.parameters()).device
    randomness = Randomness(seed)
    for start in range(first, len(labels), batch_size):
        num = min(batch_size, len(labels) - start)
        y = torch.from_numpy(labels[start : start + num]).to(device)
        denoiser = guided(model.module, y, arch.num_classes, settings.guidance, channels)

        def step_noise(position: int, start: int = start, num: int = num) -> Tensor:
            return torch.from_numpy(randomness.at(position + 1, start, num).normal("sample-noise", shape)).to(device)

        x = step_noise(-1)
        if settings.sampler == "ddpm":
            trajectory = sample_ancestral(denoiser, schedule, x, step_noise, settings.clip)
        else:
            trajectory = sample_ddim(denoiser, schedule, x, step_noise, settings.clip, settings.eta)
        yield SampleBatch(start, deque(trajectory, maxlen=1).pop(), y)


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, C, S, S) in [-1, 1] -> uint8 (B, S, S, C): trunc(clamp(127.5 x + 128, 0, 255)), the published rule."""
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
