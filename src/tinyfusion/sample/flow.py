"""Samplers of a flow, by the noiseless or the stochastic equation, and the likelihood of data.

Shapes: B images, C channels, S input side. Integration is over c = 1 - noise level, from 0 (noise) to 1 (data); times t of the
network are in its family's convention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.reading import explained
from tinyfusion.core.rng import Randomness
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import Denoiser
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.integrate import (
    ADAPTIVE_METHODS,
    EVEN_METHODS,
    Ends,
    Field,
    batch_steps,
    check_points,
    grid_steps,
    log_density,
    root_mean_square,
    sample_steps,
)
from tinyfusion.processes.stochastic import Stochastic, StochasticMethod, sample_stochastic
from tinyfusion.processes.time import check_choice, check_shift, shift_for, sigma_grid
from tinyfusion.sample.drive import WHOLE, GuidedSampler, SampleDraws, check_guidance, conditional, guided

Kind = Literal["ode", "sde"]
ErrorNorm = Literal["sample", "batch"]
PUBLISHED_POINTS = 250
# at the default tolerances
_USUAL_CALLS = {"dopri5": 80, "bosh3": 120, "adaptive_heun": 400, "fehlberg2": 60, "dopri8": 150}


@dataclass(frozen=True)
class FlowSampler(GuidedSampler):
    """Settings of a trajectory.

    kind: ode integrates the velocity, sde the stochastic equation of `processes/stochastic.py` with the settings `stochastic`.
    Of ode: method, one of `EVEN_METHODS` with `num_points` - 1 even steps, or of `ADAPTIVE_METHODS` with steps by atol and rtol.
    shift, shift_terminal: of the noise levels of even methods, see `sigma_grid`; 1 and None: even. error_norm: adaptive steps
    of every image alone ("sample"), or of the batch together ("batch", published), where an image depends on its neighbours
    by about the tolerance. eps: distance from the ends of time, None is the published one, see `Flow.ends`. guidance: scale, 1
    or more; 1 runs the conditional model alone. guided: channels under guidance, the family's published ones or all.
    interval: of guidance, 0 at the data and 1 at noise. Raises ValueError on anything else.
    """

    kind: Kind = "ode"
    method: str = "dopri5"
    num_points: int = PUBLISHED_POINTS
    atol: float = 1e-6
    rtol: float = 1e-3
    error_norm: ErrorNorm = "sample"
    stochastic: Stochastic = dataclasses.field(default_factory=Stochastic)
    eps: float | None = None
    shift: float = 1.0
    shift_terminal: float | None = None
    guidance: float = 1.5
    guided: Literal["published", "all"] = "published"
    interval: tuple[float, float] = WHOLE

    def __post_init__(self) -> None:
        check_guidance(self.guidance, self.interval)
        check_choice("sampler of a flow", self.kind, Kind)
        self._check_shift()
        if self.kind == "sde":
            return
        if self.method not in (*EVEN_METHODS, *ADAPTIVE_METHODS):
            raise ValueError(
                f"unknown method {self.method!r} of ode; there is {', '.join((*EVEN_METHODS, *ADAPTIVE_METHODS))}"
            )
        check_points(self.num_points)
        if not (self.atol > 0 and self.rtol >= 0):
            raise ValueError(f"tolerances are above 0 (rtol may be 0); got atol {self.atol:g}, rtol {self.rtol:g}")
        check_choice("error norm", self.error_norm, ErrorNorm)

    def _check_shift(self) -> None:
        terminal = self.shift_terminal
        check_shift(self.shift)
        if terminal is not None and not 0 < terminal < 1:
            raise ValueError(f"the last noise level must be above 0 and below 1; got {terminal:g}")
        if self.is_shifted and not (self.kind == "ode" and self.method in EVEN_METHODS):
            chosen = self.method if self.kind == "ode" else self.kind
            raise ValueError(f"a shift needs sampler ode with method {', '.join(EVEN_METHODS)}; got {chosen}")
        if terminal is not None and self.num_points < 3:
            raise ValueError(f"a last noise level takes 3 points in time at least; got {self.num_points}")

    @property
    def is_shifted(self) -> bool:
        """Whether the noise levels of the steps are uneven."""
        return self.shift != 1 or self.shift_terminal is not None

    @property
    def chooses_steps(self) -> bool:
        return self.kind == "ode" and self.method in ADAPTIVE_METHODS

    @property
    def calls(self) -> int:
        if self.kind == "sde":
            return self.stochastic.calls
        return _USUAL_CALLS[self.method] if self.chooses_steps else EVEN_METHODS[self.method] * (self.num_points - 1)

    @property
    def fixed_steps(self) -> bool:
        return not self.chooses_steps

    def of_steps(self, num_steps: int) -> FlowSampler:
        """Euler's method with even steps, one call of the network each."""
        even = dataclasses.replace(self, shift=1.0, shift_terminal=None)
        return dataclasses.replace(even, kind="ode", method="euler", num_points=num_steps + 1)

    def describe(self, model: LoadedModel) -> str:
        if self.kind == "sde":
            s = self.stochastic
            last = "" if s.last_step == "none" else f", last {s.last_step} {s.last_size:g}"
            how = f"sde {s.method} {s.num_points} points, {s.form} x {s.norm:g}{last}"
        elif self.chooses_steps:
            how = f"ode {self.method} atol {self.atol:g} rtol {self.rtol:g} by {self.error_norm}"
        else:
            how = f"ode {self.method} {self.num_points} points"
            how += f" shift {self.shift:g}" if self.shift != 1 else ""
            how += f" to {self.shift_terminal:g}" if self.shift_terminal is not None else ""
        eps = "" if self.eps is None else f" eps {self.eps:g}"
        flow = flow_of(model)
        return f"{flow.path} {flow.prediction} {how}{eps} | {self.describe_guidance(model)}"

    def network(self, model: LoadedModel, condition: Condition) -> Denoiser:
        """The model under guidance: (x, t) -> its prediction; t (B,), equal for all if guidance has an interval."""
        channels, sigma = self.guided_channels(model), flow_of(model).convention.sigma
        return guided(model, condition, self.guidance, channels, self.interval, noise_share=sigma)

    def steps(
        self,
        field: Field,
        x: Tensor,
        ends: Ends,
        norm: Callable[[Tensor], Tensor] = root_mean_square,
        beyond: bool = True,
    ) -> Iterator[Tensor]:
        """x after every step of ode from ends[0] to ends[1]. norm: of the errors of a sample; beyond: as in `batch_steps`."""
        if not self.chooses_steps:
            return grid_steps(field, x, self._grid(ends, x.device), self.method)
        if self.error_norm == "batch":
            return batch_steps(field, x, ends, self.method, self.atol, self.rtol, beyond)
        return sample_steps(field, x, ends, self.method, self.atol, self.rtol, norm)

    def _grid(self, ends: Ends, device: torch.device) -> Tensor:
        """(num_points,) points from ends[0] to ends[1], even or shifted, float32."""
        if not self.is_shifted:
            return torch.linspace(*ends, self.num_points, dtype=torch.float32, device=device)
        clean = torch.from_numpy(1 - sigma_grid(self.num_points, self.shift, self.shift_terminal))
        grid = (min(ends) + (max(ends) - min(ends)) * clean).float().to(device)
        return grid if ends[0] <= ends[1] else grid.flip(0)

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        """x after every step, from x ~ N(0, 1); adaptive steps of single images are at their own times."""
        flow, x = flow_of(model), draws.images(model)
        if self.kind == "sde":
            noise = partial(draws.images, model)
            return sample_stochastic(self.network(model, condition), flow, self.stochastic, x, noise, self.eps)
        ends = flow.sampling_ends(self.eps)
        if not self.chooses_steps:
            return self.steps(flow.towards_data(self.network(model, condition)), x, ends)
        return self._in_legs(model, flow, condition, x, ends)

    def _in_legs(self, model: LoadedModel, flow: Flow, condition: Condition, x: Tensor, ends: Ends) -> Iterator[Tensor]:
        """Adaptive steps that end where guidance begins and ends, so that they need not resolve these jumps."""
        always = dataclasses.replace(self, interval=WHOLE).network(model, condition)
        alone = conditional(model, condition)
        jumps = [time for time in (1 - self.interval[1], 1 - self.interval[0]) if ends[0] < time < ends[1]]
        for leg in pairwise([ends[0], *jumps, ends[1]]):
            is_guided = self.interval[0] <= 1 - sum(leg) / 2 <= self.interval[1]
            if leg[0] < leg[1]:
                field = flow.towards_data(always if is_guided else alone)
                for after in self.steps(field, x, leg, beyond=_beyond(flow)):
                    x = after
                    yield x

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """A step with one call of the network, half-way: Euler's, of sde with its noise."""
        flow, x = flow_of(model), draws.images(model)
        clean, size = torch.full((len(x),), 0.5, device=x.device), 1 / PUBLISHED_POINTS
        t, network = flow.convention.at_clean(clean), self.network(model, condition)
        velocity, drift = flow.towards_data(network), self.stochastic.drift(network, flow)

        def step() -> Tensor:
            if self.kind == "ode":
                return x + size * velocity(x, clean)
            return x + size * drift(x, t) + torch.sqrt(2 * self.stochastic.rate(flow, t) * size) * x

        return step


def _beyond(flow: Flow) -> bool:
    """Whether times outside of the ends are defined: only a velocity network needs no path there."""
    return flow.prediction == "velocity"


def flow_of(model: LoadedModel) -> Flow:
    """The path and the prediction of a model. Raises UserError if its settings are invalid."""
    with prefixed("the model's process_settings", ValueError, TypeError):
        return Flow.of_settings(model.facts.process_settings)


def log_likelihood(
    model: LoadedModel,
    x: Tensor,
    condition: Condition,
    sampler: FlowSampler | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """(B,) log density of x (B, C, S, S) given its condition, float64, in nats, in the model's own space.

    sampler: ode without guidance, any method; None: dopri5 with atol and rtol 1e-5 per image. One probe of random signs per
    image, addressed by (seed, first + i), is an unbiased estimate of the divergence: average over seeds for single images.
    Divide by -C S S ln 2 for bits per dimension. There are no terms for the grey levels of pixels or for an autoencoder.
    Raises ValueError on guidance, and on sde. Source: see `log_density`.
    """
    sampler = sampler or FlowSampler(guidance=1.0, atol=1e-5, rtol=1e-5)
    if sampler.kind != "ode" or sampler.guidance != 1:
        raise ValueError(
            "a likelihood needs an ode without guidance (a guided model is the flow of no density); got "
            f"{sampler.kind} with guidance {sampler.guidance:g}"
        )
    flow = flow_of(model)
    signs = Randomness(seed).at(0, first, len(x)).uniform("likelihood-probe", tuple(x.shape[1:]))
    probe = torch.where(torch.from_numpy(signs) < 0.5, -1.0, 1.0).float().to(x.device)
    noise_end, data_end = flow.sampling_ends(sampler.eps)

    def steps(field: Field, state: Tensor, norm: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        return sampler.steps(field, state, (data_end, noise_end), norm, _beyond(flow))

    return log_density(flow.towards_data(conditional(model, condition)), x, probe, steps)


# ------------------------------------------------------------------------------------------------------------- recipes


def from_section(settings: SampleSection, model: LoadedModel) -> FlowSampler:
    """The sampler of a recipe, by default ode with dopri5. Raises UserError on invalid settings."""
    kind, own = settings.sampler or "ode", settings.flow
    if kind not in ("ode", "sde"):
        raise UserError(f"--sampler {kind} is not for models of family {model.family.name}: they take ode, sde")
    for name in ("clip", "eta"):
        if getattr(settings, name):
            raise UserError(f"sample.{name} is not for models of family {model.family.name}: leave it out")
    method = own.method or ("dopri5" if kind == "ode" else "euler")
    if kind == "ode" and method in ADAPTIVE_METHODS and settings.num_steps is not None:
        raise UserError(
            f"--num-steps {settings.num_steps} with sample.flow.method {method}, which chooses its steps itself: leave it out, "
            f"or take one of {', '.join(EVEN_METHODS)}"
        )
    if kind == "sde" and method not in get_args(StochasticMethod):
        raise UserError(
            f"sample.flow.method {method!r} is not for sde: it takes {', '.join(get_args(StochasticMethod))}"
        )
    num_points = PUBLISHED_POINTS if settings.num_steps is None else settings.num_steps
    with explained(f"--sampler {kind}", ValueError):
        sampler = FlowSampler(
            kind=kind,
            method=method if kind == "ode" else "dopri5",
            num_points=num_points,
            atol=own.atol,
            rtol=own.rtol,
            error_norm=own.error_norm,
            stochastic=Stochastic(
                method=method if kind == "sde" else "euler",  # type: ignore[arg-type]
                num_points=num_points,
                form=own.diffusion_form,
                norm=own.diffusion_norm,
                last_step=own.last_step,
                last_size=own.last_step_size,
            ),
            eps=own.sample_eps,
            shift=shift_for(own, model.arch.num_tokens),
            shift_terminal=own.shift_terminal,
            guidance=settings.guidance,
            guided=settings.guidance_channels,
            interval=settings.guidance_interval,
        )
        flow_of(model).sampling_ends(sampler.eps)
    return sampler


def cheap(settings: SampleSection, most_steps: int) -> SampleSection:
    """The same settings if they make a fixed number of at most `most_steps` steps, else Heun's method with so many calls."""
    even = settings.sampler == "sde" or settings.flow.method in EVEN_METHODS
    if even and (settings.num_steps or PUBLISHED_POINTS) <= most_steps:
        return settings
    flow = dataclasses.replace(settings.flow, method="heun2")
    return dataclasses.replace(settings, sampler="ode", num_steps=most_steps // 2 + 1, flow=flow)
