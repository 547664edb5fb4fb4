"""Samplers of the Gaussian process: ancestral, DDIM, and fast solvers in 10 to 50 steps, DPM-Solver++ (2M) and UniPC of diffusers.

Shapes: B images, C channels, S input side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError, prefixed
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
from tinyfusion.sample.drive import WHOLE, GuidedSampler, SampleDraws, check_guidance, guided

GaussianName = Literal["ddpm", "ddim", "dpm-solver++", "unipc"]
PUBLISHED_STEPS = 250
SOLVERS = ("dpm-solver++", "unipc")
# the betas of `Schedule`, in diffusers' settings
PROCESS = {
    "num_train_timesteps": NUM_TIMESTEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "timestep_spacing": "linspace",
}  # fmt: skip
_MIDDLE = 500  # timestep of the timed step; all are equally fast


@dataclass(frozen=True)
class GaussianSampler(GuidedSampler):
    """Settings of a trajectory.

    guidance: scale, 1 or more; 1 runs the conditional model alone. guided: noise channels under guidance, the family's
    published ones or all. eta: DDIM's share of fresh noise, 0 to 1. clip: of ddpm and ddim. interval: of guidance, in shares
    of the timesteps, 0 to 1. Raises ValueError on anything else, and on a number of steps that the sampler cannot make.
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
                raise ValueError(f"clip is for ddpm and ddim: {self.sampler} uses several steps together")
            if not 1 <= self.num_steps < NUM_TIMESTEPS:
                raise ValueError(f"takes 1 to {NUM_TIMESTEPS - 1} steps (10 to 50 are usual); got {self.num_steps}")
        else:
            respaced_timesteps(self.spacing)

    @property
    def spacing(self) -> str:
        """The respacing string of ddpm (even sections) and ddim (the stride rule)."""
        return str(self.num_steps) if self.sampler == "ddpm" else f"ddim{self.num_steps}"

    @property
    def calls(self) -> int:
        return self.num_steps

    def of_steps(self, num_steps: int) -> GaussianSampler:
        """Ancestral, which can make any number of steps."""
        return dataclasses.replace(self, sampler="ddpm", num_steps=num_steps)

    def describe(self, model: LoadedModel) -> str:
        eta = f" eta {self.eta:g}" if self.sampler == "ddim" and self.eta else ""
        clipped = " clipped" if self.clip else ""
        return f"{self.sampler} {self.num_steps} steps{eta}{clipped} | {self.describe_guidance(model)}"

    def denoiser(self, model: LoadedModel, condition: Condition) -> Denoiser:
        """The model under guidance: (x, original timestep) -> noise prediction and variance."""
        channels = self.guided_channels(model)
        return guided(
            model, condition, self.guidance, channels, self.interval, noise_share=lambda t: t / (NUM_TIMESTEPS - 1)
        )

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        denoiser, x = self.denoiser(model, condition), draws.images(model)
        if self.sampler in SOLVERS:
            return sample_solver(denoiser, self.sampler, self.num_steps, x)
        schedule, step_noise = Schedule(self.spacing), partial(draws.images, model)
        if self.sampler == "ddpm":
            return sample_ancestral(denoiser, schedule, x, step_noise, self.clip)
        return sample_ddim(denoiser, schedule, x, step_noise, self.clip, self.eta)

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """An ancestral step in the middle of the chain."""
        denoiser, schedule, x = self.denoiser(model, condition), Schedule(), draws.images(model)
        index = torch.full((len(x),), _MIDDLE, device=x.device)

        def step() -> Tensor:
            predicted, v = split_output(denoiser(x, index), x.shape[1])
            gaussian = schedule.model_gaussian(predicted, v, x, index, clip=False)
            return gaussian.mean + torch.exp(0.5 * gaussian.log_variance) * x

        return step


def sample_solver(model: Denoiser, name: str, num_steps: int, x: Tensor) -> Iterator[Tensor]:
    """Solve the noiseless equation from x (B, C, H, W) ~ N(0, 1): yields x after every step, one call of the model each.

    A learned variance is not used, and no noise is drawn. Timesteps are spread evenly over 0..999, both ends included
    ("linspace", the default of both schedulers), and the last step ends without noise.
    Sources: Lu et al. arXiv 2211.01095; Zhao et al. arXiv 2302.04867.
    """
    solver, channels = solver_for(name), x.shape[1]
    with _quiet():
        solver.set_timesteps(num_steps)
    for t in solver.timesteps:
        original = torch.full((x.shape[0],), int(t), dtype=torch.int64, device=x.device)
        noise, _ = split_output(model(x, original), channels)
        x = solver.step(noise, t, x).prev_sample
        yield x


def solver_for(name: str) -> Any:
    """A new scheduler of diffusers; each batch has its own, because they store their steps."""
    import diffusers  # late: costs seconds

    kind: Any = diffusers.UniPCMultistepScheduler if name == "unipc" else diffusers.DPMSolverMultistepScheduler
    # order 2 and "dpmsolver++" are also the defaults
    with _quiet():
        return kind(**PROCESS, solver_order=2, **({} if name == "unipc" else {"algorithm_type": "dpmsolver++"}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without NumPy's warning about the way diffusers converts tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        yield


def from_section(settings: SampleSection, model: LoadedModel) -> GaussianSampler:
    """The sampler of a recipe, with published defaults. Raises UserError on invalid settings."""
    name = settings.sampler or "ddpm"
    if name not in get_args(GaussianName):
        raise UserError(
            f"--sampler {name} is not for models of family {model.family.name}: they take {', '.join(get_args(GaussianName))}"
        )
    if settings.clip and name in SOLVERS:
        raise UserError(f"sample.clip is for ddpm and ddim, not {name}: leave out one of the two")
    if settings.eta and name != "ddim":
        raise UserError(f"sample.eta is for ddim, and the sampler is {name}: leave out one of the two")
    num_steps = PUBLISHED_STEPS if settings.num_steps is None else settings.num_steps
    with prefixed(f"--num-steps {num_steps} with --sampler {name}", ValueError):
        return GaussianSampler(
            name,  # type: ignore[arg-type]
            num_steps,
            settings.guidance,
            settings.guidance_channels,
            settings.eta,
            settings.clip,
            settings.guidance_interval,
        )


def cheap(settings: SampleSection, most_steps: int) -> SampleSection:
    """The same settings if they make at most `most_steps` steps, else so many of plain DDIM."""
    if (settings.num_steps or PUBLISHED_STEPS) <= most_steps:
        return settings
    return dataclasses.replace(settings, sampler="ddim", num_steps=most_steps, eta=0.0)
