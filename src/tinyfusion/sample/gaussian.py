"""Trajectories of the Gaussian process: ancestral, DDIM, and the fast solvers.

Shapes: B images, C channels, S input side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import Denoiser
from tinyfusion.processes.gaussian import (
    NUM_TIMESTEPS,
    Schedule,
    respaced_timesteps,
    sample_ancestral,
    sample_ddim,
    split_output,
)
from tinyfusion.processes.solvers import SOLVERS, check_steps, sample_solver
from tinyfusion.sample.drive import SampleDraws
from tinyfusion.sample.guidance import WHOLE, check_guidance, described, guided, guided_channels

GaussianName = Literal["ddpm", "ddim", "dpm-solver++", "unipc"]
PUBLISHED_STEPS = 250
_MIDDLE = 500  # timestep of the step that is timed; none is quicker than another


@dataclass(frozen=True)
class GaussianSampler:
    """How a trajectory is made.

    guidance: scale, 1 or more; 1 runs the conditional model alone. guided: noise channels under guidance, the family's
    published ones or all. eta: DDIM's share of fresh noise, 0 to 1. clip: of ddpm and ddim. interval: shares of the
    timesteps, 0 to 1, between which there is guidance. Raises ValueError on anything else, and on a number of steps that
    the sampler's rule cannot give.
    """

    sampler: GaussianName = "ddpm"
    num_steps: int = PUBLISHED_STEPS
    guidance: float = 1.5
    guided: Literal["published", "all"] = "published"
    eta: float = 0.0
    clip: bool = False
    interval: tuple[float, float] = WHOLE

    def __post_init__(self) -> None:
        check_guidance(self.guidance, self.interval)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta:g}")
        if self.sampler in SOLVERS:
            if self.clip:
                raise ValueError(f"clip is for ddpm and ddim: {self.sampler} takes several steps together")
            check_steps(self.num_steps)
        else:
            respaced_timesteps(self.spacing)

    @property
    def spacing(self) -> str:
        """The respacing string of ddpm (even sections) and ddim (the stride rule)."""
        return str(self.num_steps) if self.sampler == "ddpm" else f"ddim{self.num_steps}"

    @property
    def calls(self) -> int:
        """One pass a step."""
        return self.num_steps

    @property
    def rows(self) -> int:
        """Two where there is guidance."""
        return 2 if self.guidance > 1 else 1

    @property
    def fixed_steps(self) -> bool:
        """All of them."""
        return True

    def of_steps(self, num_steps: int) -> GaussianSampler:
        """Ancestral: it can make any number of steps."""
        return dataclasses.replace(self, sampler="ddpm", num_steps=num_steps)

    def describe(self, model: LoadedModel) -> str:
        """Sampler, steps and guidance."""
        eta = f" eta {self.eta:g}" if self.sampler == "ddim" and self.eta else ""
        guidance = described(self.guidance, self.guided_channels(model), self.guided, self.interval)
        return f"{self.sampler} {self.num_steps} steps{eta}{' clipped' if self.clip else ''} | {guidance}"

    def guided_channels(self, model: LoadedModel) -> int:
        """Leading noise channels of `model` under guidance."""
        return guided_channels(model, self.guided == "all")

    def denoiser(self, model: LoadedModel, condition: Condition) -> Denoiser:
        """The model under guidance: (x, original timestep) -> noise prediction and variance."""
        return guided(model, condition, self.guidance, self.guided_channels(model), self.interval, _share)

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        """x after every step, from x ~ N(0, 1)."""
        arch = model.arch
        shape = (arch.in_channels, arch.input_size, arch.input_size)
        denoiser, x = self.denoiser(model, condition), draws.normal(-1, shape)
        if self.sampler in SOLVERS:
            return sample_solver(denoiser, self.sampler, self.num_steps, x)

        def step_noise(position: int) -> Tensor:
            return draws.normal(position, shape)

        schedule = Schedule(self.spacing)
        if self.sampler == "ddpm":
            return sample_ancestral(denoiser, schedule, x, step_noise, self.clip)
        return sample_ddim(denoiser, schedule, x, step_noise, self.clip, self.eta)

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """An ancestral step in the middle of the chain."""
        arch, schedule = model.arch, Schedule()
        denoiser = self.denoiser(model, condition)
        x = draws.normal(-1, (arch.in_channels, arch.input_size, arch.input_size))
        index = torch.full((len(x),), _MIDDLE, device=x.device)

        def step() -> Tensor:
            predicted, v = split_output(denoiser(x, index), arch.in_channels)
            gaussian = schedule.model_gaussian(predicted, v, x, index, clip=False)
            return gaussian.mean + torch.exp(0.5 * gaussian.log_variance) * x

        return step


def _share(timestep: float) -> float:
    return timestep / (NUM_TIMESTEPS - 1)


def from_section(settings: SampleSection, model: LoadedModel) -> GaussianSampler:
    """The sampler of a recipe; published where it does not say. Raises UserError on what cannot be."""
    name = settings.sampler or "ddpm"
    if name not in get_args(GaussianName):
        raise UserError(
            f"--sampler {name} is not for models of family {model.family.name}: they take {', '.join(get_args(GaussianName))}"
        )
    if settings.clip and name in SOLVERS:
        raise UserError(f"sample.clip is for ddpm and ddim, not {name}: leave out one of the two")
    if settings.eta and name in SOLVERS:
        raise UserError(f"sample.eta is for ddim, and {name} draws no noise: leave out one of the two")
    num_steps = PUBLISHED_STEPS if settings.num_steps is None else settings.num_steps
    try:
        return GaussianSampler(
            name,  # type: ignore[arg-type]
            num_steps,
            settings.guidance,
            settings.guidance_channels,
            settings.eta,
            settings.clip,
            settings.guidance_interval,
        )
    except ValueError as error:
        raise UserError(f"--num-steps {num_steps} with --sampler {name}: {error}") from error


def cheap(settings: SampleSection, most_steps: int) -> SampleSection:
    """The same where it makes at most so many steps, else as many of plain DDIM."""
    if (settings.num_steps or PUBLISHED_STEPS) <= most_steps:
        return settings
    return dataclasses.replace(settings, sampler="ddim", num_steps=most_steps, eta=0.0)
