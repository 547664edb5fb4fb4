"""The part of a recipe that belongs to one process or another: how it is trained, and how it is sampled.

The same rules as in `config/recipe.py`: values only, every field explained once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tinyfusion.config.constraints import (
    Count,
    Ge,
    Gt,
    Le,
    Logit,
    Lt,
    NonNegative,
    Offset,
    Positive,
    ShareBelowHalf,
    ShareBelowOne,
    SmallCount,
)
from tinyfusion.core.errors import UserError


@dataclass(frozen=True)
class MaskedSection:
    """How a masked model is trained: what is hidden of an image, and how its diffusion head learns from it."""

    mask_ratio_min: Annotated[
        ShareBelowOne, "smallest share of hidden tokens; it is drawn once a step, normal around 1 and cut off there"
    ] = 0.7
    mask_ratio_std: Annotated[Positive, "standard deviation of that normal distribution; large is nearly uniform"] = (
        0.25
    )
    diffusion_batch_mul: Annotated[
        int, Ge(1), Le(2**16), "timesteps and noises at which the head sees every hidden token of a step"
    ] = 4
    attention_dropout: Annotated[ShareBelowOne, "share of attention weights dropped in training; published: 0.1"] = 0.0
    projection_dropout: Annotated[
        ShareBelowOne,
        "share dropped in training behind the attention projection and either layer of an MLP; published: 0.1",
    ] = 0.0
    kl_at_zero: Annotated[
        Literal["data", "teacher"],
        "distillation at timestep 0: likelihood of the data (as published), or the divergence from the teacher as elsewhere",
    ] = "data"


@dataclass(frozen=True)
class MaskedSampleSection:
    """How sampler masked reveals tokens; its sample.num_steps are the rounds in which that happens."""

    most_rounds: Annotated[
        SmallCount, "rounds where sample.num_steps is none; fewer where an image has fewer tokens than that"
    ] = 256
    head_steps: Annotated[SmallCount, "denoising steps of the diffusion head for every token"] = 100
    temperature: Annotated[Positive, "size of the head's step noise; published: 1 with guidance, 0.95 without"] = 1.0
    guidance_schedule: Annotated[
        Literal["linear", "constant"], "guidance that grows with the share of known tokens, or the same in every round"
    ] = "linear"


@dataclass(frozen=True)
class ShiftFields:
    """Shift of the noise levels of a flow: sigma becomes s sigma / (1 + (s - 1) sigma), with 0 the data and 1 noise."""

    shift: Annotated[
        float, Ge(1e-6), Le(1e6), "s of shift_type static: above 1 moves noise levels towards noise, 1 leaves them"
    ] = 1.0
    shift_type: Annotated[
        Literal["static", "exponential", "linear"],
        "static: s is shift; exponential, linear: s is exp(mu) or mu, with mu linear in the number of tokens of an image",
    ] = "static"
    base_shift: Annotated[Offset, "shift_type exponential, linear: mu at base_tokens"] = 0.5
    max_shift: Annotated[Offset, "shift_type exponential, linear: mu at max_tokens"] = 1.15
    base_tokens: Annotated[Count, "shift_type exponential, linear: tokens at which mu is base_shift"] = 256
    max_tokens: Annotated[Count, "shift_type exponential, linear: tokens at which mu is max_shift"] = 4096

    def __post_init__(self) -> None:
        if self.max_tokens <= self.base_tokens:
            raise UserError(
                f"max_tokens of a shift must be above base_tokens; got {self.max_tokens} and {self.base_tokens}"
            )


@dataclass(frozen=True)
class FlowSection(ShiftFields):
    """How a flow model is noised and scored in training; a model stores the path and the prediction that it was trained with."""

    time_sampler: Annotated[
        Literal["uniform", "logit_normal", "mode", "cosmap"], "distribution of the noise levels, before the shift"
    ] = "uniform"
    logit_mean: Annotated[Logit, "logit_normal: mean of log(sigma / (1 - sigma)); above 0 is more noise"] = 0.0
    logit_std: Annotated[float, Gt(0), Le(1000), "logit_normal: its standard deviation"] = 1.0
    mode_scale: Annotated[
        float,
        Ge(-1),
        Le(2 / (math.pi - 2)),
        "mode: above 0 favours the middle, below 0 the ends, 0 is uniform; -1 to 1.75",
    ] = 1.29
    path: Annotated[
        Literal["linear", "gvp", "vp"],
        "x_t = alpha x + sigma noise: straight, variance-preserving arc, or VP diffusion",
    ] = "linear"
    prediction: Annotated[Literal["velocity", "noise", "score"], "what the network gives"] = "velocity"
    loss_weight: Annotated[
        Literal["none", "velocity", "likelihood"],
        "noise and score models: weight of the squared error by time; velocity models are never weighted",
    ] = "none"
    train_eps: Annotated[
        ShareBelowHalf | None,
        "times that training stays away from the ends (vp: from the clean end alone); None: 0 for velocity models, else "
        "1e-3, and 1e-5 for vp",
    ] = None


@dataclass(frozen=True)
class FlowSampleSection(ShiftFields):
    """How samplers ode and sde integrate. A shift is that of the points in time of ode's methods with num_steps - 1 steps."""

    method: Annotated[
        str | None,
        "ode: dopri5, bosh3, adaptive_heun, fehlberg2, dopri8 (step size by error), or euler, midpoint, heun2, heun3, rk4 "
        "(num_steps - 1 even steps); sde: euler or heun; None: dopri5, of sde euler",
    ] = None
    atol: Annotated[Positive, "ode, step size by error: absolute tolerance of a step"] = 1e-6
    rtol: Annotated[NonNegative, "ode, step size by error: relative tolerance of a step"] = 1e-3
    error_norm: Annotated[
        Literal["sample", "batch"],
        "ode, step size by error: every image has its own steps, or (published) a batch shares them and its images depend "
        "on one another",
    ] = "sample"
    sample_eps: Annotated[
        ShareBelowHalf | None,
        "times that integration stays away from the ends (vp: from the clean end alone); None: 0 for velocity models, else "
        "1e-3, and 1e-3 for vp",
    ] = None
    shift_terminal: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None,
        "last noise level before the data, to which the shifted levels are stretched; None: as they are",
    ] = None
    diffusion_form: Annotated[
        Literal["sigma", "sbdm", "linear", "constant", "decreasing", "increasing-decreasing"],
        "sde: w(t), half the noise variance per unit of time",
    ] = "sigma"
    diffusion_norm: Annotated[NonNegative, "sde: size of w(t)"] = 1.0
    last_step: Annotated[
        Literal["mean", "euler", "tweedie", "none"],
        "sde: the last step, without noise: drift, velocity or denoising alone",
    ] = "mean"
    last_step_size: Annotated[float, Gt(0), Lt(0.5), "sde: size of the last step, out of 1"] = 0.04
