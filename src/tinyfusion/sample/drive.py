"""Draw images in batches, with or without guidance: image i is the same for every batch size.

Shapes: B images of a batch, C channels, S input side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition, concat
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import FOLDED
from tinyfusion.core.signals import check_stop
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import Denoiser, mix_guidance

WHOLE = (0.0, 1.0)  # guidance at all times


@dataclass(frozen=True)
class SampleDraws:
    """The randomness of images `first .. first + num - 1`, addressed by (seed, position, image index).

    Positions are the steps of a trajectory from 0; -1 is its start.
    """

    randomness: Randomness
    first: int
    num: int
    device: torch.device

    def at(self, position: int) -> Draws:
        return self.randomness.at(position + 1, self.first, self.num)

    def normal(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal, float32, on the device."""
        return torch.from_numpy(self.at(position).normal("sample-noise", shape)).to(self.device)

    def images(self, model: LoadedModel, position: int = -1) -> Tensor:
        """(B, C, S, S) standard normal, in the shape of the model's inputs."""
        return self.normal(position, (model.arch.in_channels, model.arch.input_size, model.arch.input_size))


class Sampler(Protocol):
    """The sampling method of one process and its settings, checked at construction (ValueError). Inherit for the defaults."""

    guidance: float

    @property
    def calls(self) -> int:
        """Number of forward passes of the network per trajectory (approximate for adaptive solvers)."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the network's batch per image: 2 with guidance."""
        return 2 if self.guidance > 1 else 1

    @property
    def fixed_steps(self) -> bool:
        """Whether every trajectory calls the network at the same times."""
        return True

    def of_steps(self, num_steps: int) -> Self:
        """The same sampler with so few steps, each as costly: for timing."""
        ...

    def describe(self, model: LoadedModel) -> str:
        """Its half of the protocol string."""
        ...

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        """x (B, C, S, S) after every step, in the model's own space, given the condition of B images."""
        ...

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """A function that makes a typical step, for timing."""
        ...


class GuidedSampler(Sampler, Protocol):
    """A sampler with classifier-free guidance on some channels and in an interval of noise levels."""

    guided: Literal["published", "all"]
    interval: tuple[float, float]

    def guided_channels(self, model: LoadedModel) -> int:
        """Leading output channels under guidance: the family's published ones, or all but the variance."""
        return model.guided_channels if self.guided == "published" else int(model.arch.in_channels)

    def describe_guidance(self, model: LoadedModel) -> str:
        """Guidance in the protocol string; where it is folded into the model, as of the guided teacher, but for `FOLDED`."""
        folded = model.facts.folded_guidance
        if folded is not None:
            return _guidance_words(model, folded.scale, folded.channels) + FOLDED
        text = _guidance_words(model, self.guidance, self.guided_channels(model))
        in_part = self.guidance > 1 and self.interval != WHOLE
        return text + (f" in [{self.interval[0]:g}, {self.interval[1]:g}]" if in_part else "")


def _guidance_words(model: LoadedModel, scale: float, channels: int) -> str:
    guided = "published" if channels == model.guided_channels else "all"
    return f"guidance {scale:g} on {channels} channel{'s' * (channels > 1)} ({guided})"


def check_guidance(scale: float, interval: tuple[float, float]) -> None:
    """ValueError on a scale below 1 and on an invalid interval."""
    if scale < 1:
        raise ValueError(f"guidance must be at least 1 (1 runs the conditional model alone); got {scale:g}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"a guidance interval is two rising shares in [0, 1]; got {low:g} and {high:g}")


def conditional(model: LoadedModel, condition: Condition) -> Denoiser:
    """The model with its condition bound: (x, t) -> output in float32, for weights of any dtype."""
    module, inputs = model.module, model.family.inputs(condition)
    dtype = next(module.parameters()).dtype
    return lambda x, t: module(x.to(dtype), t, **inputs).float()


def guided(
    model: LoadedModel,
    condition: Condition,
    scale: float,
    channels: int,
    interval: tuple[float, float] = WHOLE,
    noise_share: Callable[[float], float] | None = None,
) -> Denoiser:
    """Classifier-free guidance on the first `channels` output channels; the others (with the variance) stay conditional.

    output = uncond + scale * (cond - uncond). One forward pass over the doubled batch, conditional half first. The
    published models guide min(3, C) of their C channels. Scale 1 is the conditional model and runs undoubled, and so does a
    time t (one for the whole batch) whose `noise_share`, 0 at the data and 1 at pure noise, is outside of `interval`.
    Source: Ho & Salimans, arXiv 2207.12598; of the interval: Kynkaanniemi et al., arXiv 2404.07724, who use noise levels.
    Differs from the published wrapper, which carries the guided half twice: only the conditional half is returned.
    """
    if interval != WHOLE and noise_share is None:
        raise ValueError("an interval of guidance needs noise_share, the position of a time in it")
    alone = conditional(model, condition)
    if scale == 1.0:
        return alone
    pair = conditional(model, concat([condition, condition.null()]))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # reading the time makes the host wait for the device, so only if it matters
        if noise_share and interval != WHOLE and not interval[0] <= noise_share(float(t[0])) <= interval[1]:
            return alone(x, t)
        return mix_guidance(pair(torch.cat([x, x]), torch.cat([t, t])), scale, channels)

    return denoise


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples `first ..`: x (B, C, S, S) in the model's own space, and their conditions."""

    first: int
    x: Tensor
    condition: Condition


def image_labels(
    num_images: int, num_classes: int, seed: int, classes: Sequence[int] = (), balanced: bool = False
) -> np.ndarray:
    """(num_images,) int64: the given classes in turn, else all in turn if `balanced`, else uniform by image index."""
    if classes or balanced:
        listed = np.array(classes if classes else range(num_classes), dtype=np.int64)
        return listed[np.arange(num_images) % len(listed)]
    return Randomness(seed).at(0, 0, num_images).integers("sample-label", num_classes)


@torch.no_grad()
def sample(
    model: LoadedModel,
    labels: Sequence[int] | np.ndarray,
    sampler: Sampler,
    seed: int,
    batch_size: int = 64,
    first: int = 0,
    last: int | None = None,
    table: Condition | None = None,
) -> Iterator[SampleBatch]:
    """Draw images `first .. last - 1` with the conditions `labels` (one per image index), a batch at a time.

    table: conditions by label; None: the model's own. Runs on the model's device, the model in the dtype of its weights, the
    rest in float32. Initial and step noise are addressed by (seed, step, image index).
    """
    labels = np.asarray(labels, dtype=np.int64)[:last]
    device = next(model.module.parameters()).device
    table = model.conditions if table is None else table
    for start in range(first, len(labels), batch_size):
        condition = table.index(torch.from_numpy(labels[start : start + batch_size])).to(device)
        draws = SampleDraws(Randomness(seed), start, len(condition), device)
        x = torch.empty(0)
        for after in sampler.trajectory(model, condition, draws):
            check_stop()
            x = after
        yield SampleBatch(start, x, condition)


def to_uint8(x: Tensor) -> np.ndarray:
    """(B, C, S, S) in [-1, 1] -> uint8 (B, S, S, C): trunc(clamp(127.5 x + 128, 0, 255)), the published rule."""
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
