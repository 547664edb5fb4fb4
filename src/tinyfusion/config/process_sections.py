"""Sections of a recipe for one process: training and sampling of flows and masked models (rules: `config/recipe.py`)."""

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
    """Training of a masked model: the share of hidden tokens, and the diffusion head."""

    mask_ratio_min: Annotated[
        ShareBelowOne, "smallest share of hidden tokens, drawn once a step from a normal at 1"
    ] = 0.7
    mask_ratio_std: Annotated[Positive, "standard deviation of that normal; large is nearly uniform"] = 0.25
    diffusion_batch_mul: Annotated[int, Ge(1), Le(2**16), "noise draws of the head for each hidden token of a step"] = 4
    attention_dropout: Annotated[ShareBelowOne, "dropout of attention weights; published: 0.1"] = 0.0
    projection_dropout: Annotated[
        ShareBelowOne, "dropout after the attention projection and each layer of an MLP; published: 0.1"
    ] = 0.0
    kl_at_zero: Annotated[
        Literal["data", "teacher"],
        "distillation at timestep 0: likelihood of the data (published), or KL to the teacher",
    ] = "data"


@dataclass(frozen=True)
class MaskedSampleSection:
    """Sampler masked; sample.num_steps are the rounds in which it reveals tokens."""

    most_rounds: Annotated[SmallCount, "most rounds where sample.num_steps is none; at most one per token"] = 256
    head_steps: Annotated[SmallCount, "denoising steps of the diffusion head for each token"] = 100
    temperature: Annotated[Positive, "scale of the head's step noise; published: 1 with guidance, 0.95 without"] = 1.0
    guidance_schedule: Annotated[
        Literal["linear", "constant"], "guidance grows with the share of known tokens, or is the same in every round"
    ] = "linear"


@dataclass(frozen=True)
class ShiftFields:
    """Shift of the noise levels of a flow: sigma becomes s sigma / (1 + (s - 1) sigma), with 0 the data and 1 noise."""

    shift: Annotated[float, Ge(1e-6), Le(1e6), "s of shift_type static: above 1 is more noise, 1 is no shift"] = 1.0
    shift_type: Annotated[
        Literal["static", "exponential", "linear"],
        "static: s is shift; exponential, linear: s is exp(mu) or mu, with mu linear in the tokens of an image",
    ] = "static"
    base_shift: Annotated[Offset, "shift_type exponential, linear: mu at base_tokens"] = 0.5
    max_shift: Annotated[Offset, "shift_type exponential, linear: mu at max_tokens"] = 1.15
    base_tokens: Annotated[Count, "shift_type exponential, linear: tokens at which mu is base_shift"] = 256
    max_tokens: Annotated[Count, "shift_type exponential, linear: tokens at which mu is max_shift"] = 4096

    def __post_init__(self) -> None:
        if self.max_tokens <= self.base_tokens:
            given = f"{self.max_tokens} and {self.base_tokens}"
            raise UserError(f"max_tokens of a shift must be above base_tokens; got {given}")


@dataclass(frozen=True)
class FlowSection(ShiftFields):
    """Noise and loss of a flow model in training; a model stores the path and the prediction of its training."""

    time_sampler: Annotated[
        Literal["uniform", "logit_normal", "mode", "cosmap"], "distribution of the noise levels, before the shift"
    ] = "uniform"
    logit_mean: Annotated[Logit, "logit_normal: mean of log(sigma / (1 - sigma)); above 0 is more noise"] = 0.0
    logit_std: Annotated[float, Gt(0), Le(1000), "logit_normal: its standard deviation"] = 1.0
    mode_scale: Annotated[
        float, Ge(-1), Le(2 / (math.pi - 2)), "mode: above 0 favours the middle, below 0 the ends; -1 to 1.75"
    ] = 1.29
    path: Annotated[
        Literal["linear", "gvp", "vp"],
        "x_t = alpha x + sigma noise: straight, variance-preserving arc, or VP diffusion",
    ] = "linear"
    prediction: Annotated[Literal["velocity", "noise", "score"], "output of the network"] = "velocity"
    loss_weight: Annotated[
        Literal["none", "velocity", "likelihood", "data", "sigma_sqrt", "cosmap"],
        "weight of the squared error by time; noise and score models: velocity, likelihood; velocity models: data sigma^2, sigma_sqrt "
        "sigma^-2, cosmap",
    ] = "none"
    guidance: Annotated[
        NonNegative | None, "networks that take guidance as an input: its value in training; None: that of the pipeline"
    ] = None
    train_eps: Annotated[
        ShareBelowHalf | None,
        "margin of times at the ends (vp: the clean end only); None: 0 for velocity models, else 1e-3, of vp 1e-5",
    ] = None


@dataclass(frozen=True)
class FlowSampleSection(ShiftFields):
    """Integration by samplers ode and sde. A shift is that of the points in time of ode's methods with num_steps - 1 steps."""

    method: Annotated[
        str | None,
        "ode: dopri5, bosh3, adaptive_heun, fehlberg2, dopri8 (adaptive), or euler, midpoint, heun2, heun3, rk4 (num_steps - 1 "
        "even steps); sde: euler or heun; None: dopri5, of sde euler",
    ] = None
    atol: Annotated[Positive, "adaptive ode: absolute tolerance of a step"] = 1e-6
    rtol: Annotated[NonNegative, "adaptive ode: relative tolerance of a step"] = 1e-3
    error_norm: Annotated[
        Literal["sample", "batch"], "adaptive ode: step size per image, or (published) one for the images of a batch"
    ] = "sample"
    sample_eps: Annotated[
        ShareBelowHalf | None,
        "margin of times at the ends (vp: the clean end only); None: 0 for velocity models, else 1e-3",
    ] = None
    shift_terminal: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None,
        "last noise level before the data, to which shifted levels are stretched; None: no stretching",
    ] = None
    diffusion_form: Annotated[
        Literal["sigma", "sbdm", "linear", "constant", "decreasing", "increasing-decreasing"],
        "sde: w(t), half the noise variance per unit of time",
    ] = "sigma"
    diffusion_norm: Annotated[NonNegative, "sde: scale of w(t)"] = 1.0
    last_step: Annotated[
        Literal["mean", "euler", "tweedie", "none"], "sde: last step, without noise: drift, velocity or denoising"
    ] = "mean"
    last_step_size: Annotated[float, Gt(0), Lt(0.5), "sde: size of the last step, out of 1"] = 0.04
