"""Mixtures of image and noise: what the output of a network states of both, for every process that mixes the two.

x_t = alpha_t x_0 + sigma_t noise. Distillation and sampling in few steps need no more of a process than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tinyfusion.processes.flow import Flow
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, Schedule, split_output


class Mixture(NamedTuple):
    """A clean image and the noise on it, (B, C, H, W) each."""

    clean: Tensor
    noise: Tensor


class Noising(Protocol):
    """The mixture of a process. Times t (B,) are those that the network takes; levels run from 0 (data) to 1 (noise)."""

    def times(self, levels: np.ndarray) -> Tensor:
        """Times of the network at noise levels of any shape."""
        ...

    def weights(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t, shaped (B, 1, ...) with `ndim` axes."""
        ...

    def parts(self, output: Tensor, x: Tensor, t: Tensor) -> Mixture:
        """The mixture that the network's output at x (B, C, H, W) and t states, float32."""
        ...

    def target(self, parts: Mixture, t: Tensor) -> Tensor:
        """The output (B, C, H, W) that states this mixture, without channels of a variance: the inverse of `parts`."""
        ...

    def mixed(self, parts: Mixture, t: Tensor) -> Tensor:
        """x at times t."""
        alpha, sigma = self.weights(t, parts.clean.ndim)
        return alpha * parts.clean + sigma * parts.noise

    def moved_per_output(self, t: Tensor, end: Tensor) -> Tensor:
        """(B,) how far the point at times `end` moves where the output at times t moves by 1: the factor between both errors."""
        one = torch.ones(len(t), 1, 1, 1, device=t.device)
        return self.mixed(self.parts(one, torch.zeros_like(one), t), end).abs().flatten()

    def between(self, x: Tensor, t: Tensor, after: Tensor, end: Tensor) -> Mixture:
        """The mixture that is x at times t and `after` at times `end`, which differ: the line through both."""
        (a, s), (a_end, s_end) = self.weights(t, x.ndim), self.weights(end, x.ndim)
        det = a * s_end - s * a_end
        return Mixture((s_end * x - s * after) / det, (a * after - a_end * x) / det)


@dataclass(frozen=True)
class GaussianNoising(Noising):
    """Of a Gaussian process whose network predicts the noise; a level is the share of the 1000 original timesteps.

    Level k / 1000 is timestep k - 1, as in the "trailing" spacing of diffusers, and level 0 the data themselves.
    """

    schedule: Schedule = field(default_factory=Schedule, compare=False)  # the published one, always

    def times(self, levels: np.ndarray) -> Tensor:
        return torch.as_tensor(np.rint(np.asarray(levels) * NUM_TIMESTEPS).astype(np.int64) - 1)

    def weights(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        alpha, sigma = (
            self.schedule.at(table, t.clamp(min=0), ndim)
            for table in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        )
        data = (t < 0).view(alpha.shape)
        return torch.where(data, 1.0, alpha), torch.where(data, 0.0, sigma)

    def parts(self, output: Tensor, x: Tensor, t: Tensor) -> Mixture:
        noise, _ = split_output(output, x.shape[1])
        return Mixture(self.schedule.x0_from_noise(x, t, noise), noise)

    def target(self, parts: Mixture, t: Tensor) -> Tensor:
        return parts.noise


@dataclass(frozen=True)
class FlowNoising(Noising):
    """Of a flow."""

    flow: Flow = field(default_factory=Flow)

    def times(self, levels: np.ndarray) -> Tensor:
        return torch.as_tensor(self.flow.convention.at_sigma(np.asarray(levels, dtype=np.float64)).astype(np.float32))

    def weights(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        at = self.flow.point(t, ndim)
        return at.alpha, at.sigma

    def parts(self, output: Tensor, x: Tensor, t: Tensor) -> Mixture:
        at, output = self.flow.point(t, x.ndim), output.float()
        noise, velocity = self.flow.noise(output, x, t), self.flow.velocity(output, x, t)
        return Mixture((at.d_sigma * x - at.sigma * velocity) / at.wronskian, noise)

    def target(self, parts: Mixture, t: Tensor) -> Tensor:
        at = self.flow.point(t, parts.clean.ndim)
        if self.flow.prediction == "velocity":
            return self.flow.convention.velocity_of(at.d_alpha * parts.clean + at.d_sigma * parts.noise)
        return parts.noise if self.flow.prediction == "noise" else -parts.noise / at.sigma


def noising_of_process(process: str, settings: Mapping[str, Any]) -> Noising | None:
    """The mixture of a process by its name and a model's settings of it; None where it mixes nothing. Raises ValueError on bad settings."""
    if process == "gaussian":
        return GaussianNoising()
    return FlowNoising(Flow.of_settings(settings)) if process == "flow" else None


def even_levels(num_steps: int, first: float = 1.0) -> tuple[float, ...]:
    """Noise levels of N steps, falling evenly: `first` times 1, (N - 1)/N, ..., 1/N."""
    return tuple(first * (num_steps - step) / num_steps for step in range(num_steps))


@dataclass(frozen=True)
class FewSteps:
    """How a model draws that was distilled for few steps.

    method: the distillation. levels: noise levels of the steps, falling; the first begins at noise alone. guidance: the scale that
    is folded in; the model is drawn without. fresh_noise: every step but the first noises the predicted image anew; else it goes
    on along the predicted noise, which is DDIM's step, and Euler's on a linear flow.
    """

    method: str
    levels: tuple[float, ...]
    guidance: float
    fresh_noise: bool

    @property
    def is_trailing(self) -> bool:
        """Whether its steps are DDIM's at the "trailing" timesteps of diffusers: evenly spaced from noise alone, without fresh noise."""
        even = even_levels(len(self.levels))
        steps_fit = NUM_TIMESTEPS % len(self.levels) == 0  # else its scheduler goes to other timesteps than it names
        return (
            steps_fit
            and not self.fresh_noise
            and all(abs(a - b) < 5e-4 for a, b in zip(self.levels, even, strict=True))
        )

    def describe(self) -> str:
        """In words, without the kind of noise."""
        levels = ", ".join(f"{level:g}" for level in self.levels)
        return f"{len(self.levels)} steps at noise levels {levels}, guidance {self.guidance:g} folded in"

    def __post_init__(self) -> None:
        rising = sorted(set(self.levels))
        if not self.levels or rising[::-1] != list(self.levels) or not 0 < rising[0] <= rising[-1] <= 1:
            raise ValueError(f"levels of few steps fall, from 1 at most to above 0; got {list(self.levels)}")


class LinearStep(NamedTuple):
    """A step as numbers: x becomes x * (x now) + out * (the network's output at time t) + noise * (fresh noise)."""

    t: float
    x: float
    out: float
    noise: float


def linear_steps(noising: Noising, steps: FewSteps) -> list[LinearStep]:
    """The steps of a drawing as numbers, for samplers in other programs: whatever the network predicts, a step is linear in it."""
    times = noising.times(np.append(steps.levels, 0.0))
    one, zero = torch.ones(len(times), 1, 1, 1), torch.zeros(len(times), 1, 1, 1)
    of_x, of_out = (noising.parts(output[:-1], x[:-1], times[:-1]) for output, x in ((zero, one), (one, zero)))
    alphas, sigmas = (weights.flatten().tolist()[1:] for weights in noising.weights(times))
    table = []
    for k, (alpha, sigma) in enumerate(zip(alphas, sigmas, strict=True)):
        kept, fresh = (0.0, sigma) if steps.fresh_noise else (sigma, 0.0)
        x, out = (alpha * float(of.clean[k]) + kept * float(of.noise[k]) for of in (of_x, of_out))
        table.append(LinearStep(float(times[k]), x, out, fresh))
    return table
