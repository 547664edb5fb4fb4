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
from torch import Tensor, nn

from tinyfusion.core.rng import Randomness
from tinyfusion.processes.gaussian import Schedule, sample_ancestral, sample_ddim
from tinyfusion.sample.guidance import guided


@dataclass(frozen=True)
class SamplerSettings:
    """How a trajectory is made. guided_channels: leading noise channels under guidance."""

    sampler: Literal["ddpm", "ddim"]
    num_steps: int
    guidance: float
    guided_channels: int
    eta: float = 0.0
    clip: bool = False

    @property
    def spacing(self) -> str:
        """The respacing string: even sections for ddpm, the stride rule for ddim."""
        return str(self.num_steps) if self.sampler == "ddpm" else f"ddim{self.num_steps}"


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
    model: nn.Module,
    labels: np.ndarray,
    shape: tuple[int, int, int],
    null_label: int,
    settings: SamplerSettings,
    seed: int,
    batch_size: int,
    first: int = 0,
) -> Iterator[SampleBatch]:
    """Draw images `first ..` of those that `labels` (all of them, by image index) name, a batch at a time.

    Initial and step noise are addressed by (seed, step, image index). Raises ValueError for a number of steps that the
    sampler's rule cannot give.
    """
    schedule = Schedule(settings.spacing)
    device = next(model.parameters()).device
    randomness = Randomness(seed)
    for start in range(first, len(labels), batch_size):
        num = min(batch_size, len(labels) - start)
        y = torch.from_numpy(labels[start : start + num]).to(device)
        denoiser = guided(model, y, null_label, settings.guidance, settings.guided_channels)

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
