"""The flow process: paths between noise and data, network predictions along them, and the training loss.

Shapes: B samples, C channels. A path is a function of the noise level, 0 at the data and 1 at noise
(`processes/time.py`): x = alpha x0 + sigma noise, x0 the clean image; on the linear path sigma is the noise level
itself. Velocity and derivatives are with respect to the noise level. t (B,) and the output (B, C, H, W) of
`model(x, t, **condition)` are in the family's convention of time and velocity, which `Flow.convention` converts. (In
the published code time is 0 at noise and 1 at the data; in the paper the other way round.)

Velocity, score and noise are linear in each other at a given x and t. With W = alpha sigma' - alpha' sigma, which is 1 on the
linear path, each conversion is infinite only where the quantity itself is:

    noise    e = (alpha v - alpha' x) / W          finite for every noise level
    velocity v = (alpha' x + W e) / alpha          infinite only where alpha is 0: the noise end of linear and gvp
    score    s = -e / sigma                        infinite only at the data

Source: Ma et al., arXiv 2401.08740 (paths, predictions, weights); Albergo et al., arXiv 2303.08797; weights of velocities: Esser et
al., arXiv 2403.03206.
Differs: the epsilons of training and of sampling are each used as given (the published code tests the wrong one, and
uses 0 for velocity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tinyfusion.conditioning.classes import class_inputs
from tinyfusion.conditioning.condition import ModelCall, calling
from tinyfusion.core.rng import Draws
from tinyfusion.processes.base import Batch, Denoiser, NoiseAxis, NoisyBatch, Prediction, Process, mean_flat
from tinyfusion.processes.time import DATA_AT_ONE, Level, TimeConvention, TimeSampler, check_choice

PathName = Literal["linear", "gvp", "vp"]
Predicted = Literal["velocity", "noise", "score"]
LossWeight = Literal["none", "velocity", "likelihood", "data", "sigma_sqrt", "cosmap"]
NUM_LEVELS = 1000  # of noise, as many as the Gaussian process has
_LOW_NOISE_DIVISOR = 4  # block influence at clean inputs uses the quarter of the times nearest to the data
_BETA_MIN, _BETA_MAX = 0.1, 20.0  # of the VP path
SMALL_EPS = 1e-3  # published distance from the ends, if there has to be one


class Point(NamedTuple):
    """Coefficients of a path at some noise levels: x = alpha x0 + sigma noise; d_: their derivatives; wronskian: W."""

    alpha: Tensor
    d_alpha: Tensor
    sigma: Tensor
    d_sigma: Tensor
    wronskian: Tensor


def linear_path(level: Level) -> Point:
    """The linear path: alpha = 1 - noise level, sigma = noise level."""
    one = torch.ones_like(level.sigma)
    return Point(level.clean, -one, level.sigma, one, one)


def gvp_path(level: Level) -> Point:
    """The trigonometric path (gvp), exact at both ends: alpha = cos(pi s / 2), sigma = sin(pi s / 2), s noise level."""
    quarter = math.pi / 2
    alpha, sigma = torch.sin(quarter * level.clean), torch.sin(quarter * level.sigma)
    return Point(alpha, -quarter * sigma, sigma, quarter * alpha, torch.full_like(alpha, quarter))


def vp_path(level: Level) -> Point:
    """The variance-preserving path (vp): beta from 0.1 at the data to 20 at noise, where alpha is 0.0066, not 0."""
    left = level.sigma
    log_alpha = -(left**2) * (_BETA_MAX - _BETA_MIN) / 4 - left * _BETA_MIN / 2
    slope = left * (_BETA_MAX - _BETA_MIN) / 2 + _BETA_MIN / 2  # of -log alpha
    alpha, sigma = log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))
    return Point(alpha, -alpha * slope, sigma, (alpha**2) * slope / sigma, alpha * slope / sigma)


PATHS: dict[PathName, Callable[[Level], Point]] = {"linear": linear_path, "gvp": gvp_path, "vp": vp_path}

_VELOCITY_WEIGHTS: dict[LossWeight, Callable[[Level], Tensor]] = {  # of the training examples of diffusers
    "data": lambda level: level.sigma**2,
    "sigma_sqrt": lambda level: level.sigma**-2.0,
    "cosmap": lambda level: 2 / (math.pi * (level.clean**2 + level.sigma**2)),
}


@dataclass(frozen=True)
class Flow:
    """A flow: its path, the quantity that the network predicts, and the family's convention of time and velocity.

    Raises ValueError on unknown names.
    """

    path: PathName = "linear"
    prediction: Predicted = "velocity"
    convention: TimeConvention = DATA_AT_ONE

    def __post_init__(self) -> None:
        check_choice("path", self.path, PathName)
        check_choice("prediction", self.prediction, Predicted)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> Flow:
        """The flow of a model's settings, by default the published ones. Raises ValueError on unknown settings."""
        unknown = sorted(set(settings) - {"path", "prediction"})
        if unknown:
            raise ValueError(f"unknown settings of a flow: {', '.join(unknown)}")
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        return {"path": self.path, "prediction": self.prediction}

    def point(self, t: Tensor, ndim: int = 4) -> Point:
        """Coefficients of the path at t (B,), shaped (B, 1, ...) with `ndim` axes, those of x."""
        return PATHS[self.path](self.convention.level(t.view(-1, *[1] * (ndim - 1))))

    def ends(self, eps: float | None, default_vp: float) -> tuple[float, float]:
        """The range (low, high) of 1 - noise level in which a model is trained or sampled.

        eps: distance from both ends of [0, 1], on the VP path only from the end at the data. None: the published value:
        0 for velocity, 1e-3 for noise and score, `default_vp` on the VP path. Raises ValueError if eps is outside of
        [0, 0.5), or if it is 0 and the velocity is infinite at an end.
        """
        if eps is None:
            eps = default_vp if self.path == "vp" else 0.0 if self.prediction == "velocity" else SMALL_EPS
        needed = self.path == "vp" or self.prediction != "velocity"
        if not (0 < eps < 0.5 if needed else 0 <= eps < 0.5):
            least = "above 0" if needed else "at least 0"
            raise ValueError(
                f"the distance from the ends of time must be {least} and below 0.5 for path {self.path} with prediction "
                f"{self.prediction}; got {eps:g}"
            )
        return (0.0 if self.path == "vp" else eps), 1.0 - eps

    def training_ends(self, eps: float | None) -> tuple[float, float]:
        """`ends` for training, where eps is 1e-5 by default on the VP path."""
        return self.ends(eps, default_vp=1e-5)

    def sampling_ends(self, eps: float | None) -> tuple[float, float]:
        """`ends` for sampling, where eps is 1e-3 by default on the VP path."""
        return self.ends(eps, default_vp=SMALL_EPS)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """dx/d(noise level) from the network's output at x (B, C, H, W) and t (B,)."""
        if self.prediction == "velocity":
            return self.convention.velocity_of(output)
        at = self.point(t, x.ndim)
        noise = output if self.prediction == "noise" else -at.sigma * output
        return (at.d_alpha * x + at.wronskian * noise) / at.alpha

    def noise(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output predicts."""
        if self.prediction == "noise":
            return output
        at = self.point(t, x.ndim)
        if self.prediction == "score":
            return -at.sigma * output
        return (at.alpha * self.convention.velocity_of(output) - at.d_alpha * x) / at.wronskian

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score, the gradient of the log density of x, from the network's output; infinite at the data."""
        if self.prediction == "score":
            return output
        return -self.noise(output, x, t) / self.point(t, x.ndim).sigma

    def towards_data(self, network: Denoiser) -> Denoiser:
        """The velocity towards the data, (x, c) -> dx/dc with c = 1 - noise level, of a network of the family."""

        def slope(x: Tensor, clean: Tensor) -> Tensor:
            t = self.convention.at_clean(clean)
            return -self.velocity(network(x, t), x, t)

        return slope

    def error(self, output: Tensor, noisy: NoisyBatch, target: Tensor | None = None) -> Tensor:
        """(B, C, H, W): the error that the loss squares. target: output of another network, to use instead of the data.

        velocity: v - (alpha' x0 + sigma' noise), in the sign of the family; noise: e - noise; score: sigma s + noise.
        """
        at = self.point(noisy.t, output.ndim)
        if target is not None:
            return (at.sigma if self.prediction == "score" else 1.0) * (output - target)
        if self.prediction == "velocity":
            return output - self.convention.velocity_of(at.d_alpha * noisy.x0 + at.d_sigma * noisy.noise)
        return output - noisy.noise if self.prediction == "noise" else at.sigma * output + noisy.noise

    def weight(self, name: LossWeight, t: Tensor) -> Tensor:
        """(B,) weight of the squared error.

        Of noise and score: velocity (lambda / sigma)^2, likelihood lambda / sigma^2. lambda = sigma W / alpha, so these are
        (W / alpha)^2 and W / (alpha sigma). Of velocity, s the noise level: data s^2, the error of the clean image on the linear
        path; sigma_sqrt 1 / s^2; cosmap 2 / (pi (1 - 2 s + 2 s^2)). 1 where the other kind of network is meant.
        """
        if name == "none" or (name in _VELOCITY_WEIGHTS) != (self.prediction == "velocity"):
            return torch.ones_like(t)
        level = self.convention.level(t)
        if name in _VELOCITY_WEIGHTS:
            return _VELOCITY_WEIGHTS[name](level)
        at = PATHS[self.path](level)
        if name == "velocity":
            return (at.wronskian / at.alpha) ** 2
        return at.wronskian / (at.alpha * at.sigma)


@dataclass(frozen=True)
class FlowObjective(Process):
    """The training loss of a flow network: squared error, per sample.

    Fields of its `NoisyBatch`: x0 clean, xt = alpha x0 + sigma noise, t float32 in the convention of the family. label_drop:
    probability of replacing a condition by the null row (published: 0.1; 0 in evaluation). loss_weight: see
    `Flow.weight`. eps: see `Flow.ends`. times: their distribution. call: how the model is called.
    Raises ValueError on an invalid eps or loss weight.
    """

    label_drop: float = 0.1
    flow: Flow = field(default_factory=Flow)
    loss_weight: LossWeight = "none"
    eps: float | None = None
    times: TimeSampler = field(default_factory=TimeSampler)
    call: ModelCall = calling(class_inputs)

    def __post_init__(self) -> None:
        self.flow.training_ends(self.eps)
        check_choice("loss weight", self.loss_weight, LossWeight)

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        device, ends = batch.x.device, self.flow.training_ends(self.eps)
        t = torch.from_numpy(self.flow.convention.draw(self.times, draws.uniform("timestep"), ends)).float().to(device)
        noise = torch.from_numpy(draws.normal("noise", tuple(batch.x.shape[1:]))).to(device)
        condition = batch.condition.drop(draws, self.label_drop)
        return self.noised(Batch(batch.x, condition), t, noise, draws.step)

    def noised(self, batch: Batch, t: Tensor, noise: Tensor, step: int = 0) -> NoisyBatch:
        return NoisyBatch(batch.x, noise, self._mixed(batch.x, noise, t), t, batch.condition, step)

    def _mixed(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        at = self.flow.point(t, x0.ndim)
        return at.alpha * x0 + at.sigma * noise

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        return Prediction(self.call(model, noisy.xt, noisy.t, noisy.condition))

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-sample "mse", the mean squared error of the prediction, and "loss", the weighted mse."""
        mse = mean_flat(self.flow.error(prediction.output.float(), noisy) ** 2)
        return {"loss": mse * self.flow.weight(self.loss_weight, noisy.t), "mse": mse}

    def kd_terms(self, noisy: NoisyBatch, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """Per-sample "kd_loss", the loss with the teacher's output as target; for velocities mean (v_s - v_T)^2."""
        error = self.flow.error(own.output.float(), noisy, taught.output.detach().float())
        return {"kd_loss": mean_flat(error**2) * self.flow.weight(self.loss_weight, noisy.t)}

    def low_noise(self, noisy: NoisyBatch) -> NoisyBatch:
        """The batch with clean inputs at a quarter of its noise levels, as released for Gaussian models."""
        convention = self.flow.convention
        return replace(noisy, xt=noisy.x0, t=convention.at_sigma(convention.level(noisy.t).sigma / _LOW_NOISE_DIVISOR))

    @property
    def noise_axis(self) -> NoiseAxis:
        return NoiseAxis("time", self.flow.convention.at_sigma(1.0), self.flow.convention.at_sigma(0.0))

    @property
    def num_levels(self) -> int:
        return NUM_LEVELS

    def at_level(self, noisy: NoisyBatch, level: int) -> NoisyBatch:
        """The batch at noise level `level`; levels are evenly spaced between the two ends of training."""
        low, high = self.flow.training_ends(self.eps)
        low, high = max(low, 1 - self.times.within[1]), min(high, 1 - self.times.within[0])
        clean = high - (high - low) * level / (NUM_LEVELS - 1)
        t = torch.full_like(noisy.t, self.flow.convention.at_clean(clean))
        return replace(noisy, xt=self._mixed(noisy.x0, noisy.noise, t), t=t)
