"""Time of a flow: noise levels, their distribution in training, their shift, and the conventions of families.

Inside the flow process the noise level sigma runs from 0 (data) to 1 (noise), on the linear path
x_sigma = (1 - sigma) x0 + sigma noise, and a velocity is dx/dsigma, there noise - x0. `TimeConvention` converts from and to the
time and velocity of a family's network.

Exchanging noise and data (1 - sigma for sigma) maps each distribution to one of the same kind: the mean of a
logit-normal changes its sign, a shift s becomes 1 / s, and the rest stays. Times are therefore drawn in the direction
of the family's time, and none loses digits by subtraction from 1.

Sources: Esser et al., arXiv 2403.03206, sections 3.1 (densities) and 5.3.2 (shift); Black Forest Labs, FLUX (shift by the
number of tokens).
Differs: noise levels are continuous; training code that follows diffusers rounds them down to one of 1,000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from scipy.special import expit, ndtri
from torch import Tensor

from tinyfusion.config.process_sections import FlowSection, ShiftFields

TimeDirection = Literal["sigma", "1 - sigma"]
VelocitySign = Literal["noise - data", "data - noise"]
Density = Literal["uniform", "logit_normal", "mode", "cosmap"]
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # of the mode density, for which its transform is monotone
SHIFTS = (1e-6, 1e6)  # far beyond any use
Share = TypeVar("Share", float, np.ndarray, Tensor)


def check_choice(what: str, value: str, choices: Any) -> None:
    """Raise ValueError unless `value` is one of the choices of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"unknown {what} {value!r}; there is {', '.join(get_args(choices))}")


# ---------------------------------------------------------------------------------------------------------- conventions


class Level(NamedTuple):
    """Noise levels: sigma (1 at noise) and `clean` = 1 - sigma; computing a small one from the other loses digits."""

    sigma: Tensor
    clean: Tensor


@dataclass(frozen=True)
class TimeConvention:
    """A family's convention of time and velocity, and conversions to noise levels.

    time, scale: the network's time input is `time` times `scale`. velocity: the network's output on the linear path,
    where "data" is x0. Raises ValueError on other values.
    """

    time: TimeDirection = "sigma"
    scale: float = 1.0
    velocity: VelocitySign = "noise - data"

    def __post_init__(self) -> None:
        check_choice("time of a flow", self.time, TimeDirection)
        check_choice("velocity of a flow", self.velocity, VelocitySign)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of time must be above 0; got {self.scale:g}")

    def level(self, t: Tensor) -> Level:
        """The noise level at the family's time t."""
        share = t / self.scale
        return Level(share, 1 - share) if self.time == "sigma" else Level(1 - share, share)

    def sigma(self, t: float) -> float:
        return t / self.scale if self.time == "sigma" else 1 - t / self.scale

    def at_clean(self, clean: Share) -> Share:
        """The family's time at the noise level 1 - `clean`."""
        return self.scale * (1 - clean if self.time == "sigma" else clean)

    def at_sigma(self, sigma: Share) -> Share:
        """The family's time at the noise level sigma."""
        return self.scale * (sigma if self.time == "sigma" else 1 - sigma)

    def velocity_of(self, output: Tensor) -> Tensor:
        """Convert the output of a velocity network to dx/dsigma; the inverse conversion is the same function."""
        return output if self.velocity == "noise - data" else -output

    def draw(self, times: TimeSampler, u: np.ndarray, clean_ends: tuple[float, float]) -> np.ndarray:
        """The family's times for uniform u in (0, 1), distributed as `times` on the range `clean_ends` of 1 - sigma."""
        low, high = clean_ends
        if self.time == "sigma":
            low, high = 1 - high, 1 - low
        else:
            times = times.mirrored
        return self.scale * (low + (high - low) * times.sigma(u))


DATA_AT_ONE = TimeConvention("1 - sigma", 1.0, "data - noise")


# ---------------------------------------------------------------------------------------------------------------- shift


def shifted(sigma: Share, shift: float) -> Share:
    """Noise levels shifted by s: s sigma / (1 + (s - 1) sigma).

    s above 1 moves levels towards noise; 0 and 1 are fixed. The inverse is a shift by 1 / s. Rounding never leaves
    [0, 1], and s = 1 is exact.
    """
    moved = shift * sigma
    return moved / (moved + (1 - sigma))


def shift_for(settings: ShiftFields, num_tokens: int) -> float:
    """The shift s of a recipe for images of `num_tokens` tokens. Raises ValueError if it is outside of `SHIFTS`.

    static: s itself. exponential, linear: s = exp(mu), s = mu, where mu is linear in the number of tokens through
    (base_tokens, base_shift) and (max_tokens, max_shift), and is extrapolated beyond these two points.
    """
    if settings.shift_type == "static":
        return settings.shift
    slope = (settings.max_shift - settings.base_shift) / (settings.max_tokens - settings.base_tokens)
    mu = settings.base_shift + slope * (num_tokens - settings.base_tokens)
    shift = math.exp(min(mu, 700.0)) if settings.shift_type == "exponential" else mu
    check_shift(shift, f"the shift of shift_type {settings.shift_type} at {num_tokens} tokens (mu {mu:g})")
    return shift


def check_shift(shift: float, name: str = "a shift") -> None:
    """Raise ValueError if a shift s is outside of `SHIFTS`."""
    low, high = SHIFTS
    if not low <= shift <= high:
        raise ValueError(f"{name} must be at least {low:g} and at most {high:g}; got {shift:g}")


def sigma_grid(num_points: int, shift: float = 1.0, terminal: float | None = None) -> np.ndarray:
    """(num_points,) decreasing noise levels from 1 to 0, float64: evenly spaced, then shifted.

    terminal: the last level before 0; 1 - sigma of all levels before 0 is scaled so that the last of them has this
    value.
    """
    sigmas = shifted(np.linspace(1.0, 0.0, num_points), shift)
    if terminal is not None:
        clean = 1 - sigmas[:-1]
        sigmas[:-1] = 1 - clean * ((1 - terminal) / clean[-1])
    return sigmas


# ------------------------------------------------------------------------------------------------------------ densities


@dataclass(frozen=True)
class TimeSampler:
    """The distribution of noise levels in training: sigma as a function of a uniform number u.

    With z the standard normal quantile of u, and before the shift s of `shifted`:

        uniform       sigma = u
        logit_normal  sigma = 1 / (1 + exp(-(logit_mean + logit_std z)))
        mode          sigma = 1 - u - mode_scale (cos^2(pi u / 2) - 1 + u)
        cosmap        sigma = 1 - 1 / (tan(pi u / 2) + 1)

    All are monotone in u, so a stratified u gives stratified noise levels. within: noise levels between which the distribution is
    truncated, of a model for these alone. Raises ValueError on invalid parameters.
    """

    kind: Density = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    within: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_choice("time sampler", self.kind, Density)
        if not 0 <= self.within[0] < self.within[1] <= 1:
            raise ValueError(f"noise levels lie between 0 and 1, the lower one first; got {self.within}")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"logit_mean must be a finite number; got {self.logit_mean:g}")
        if not (math.isfinite(self.logit_std) and self.logit_std > 0):
            raise ValueError(f"logit_std must be a finite number above 0; got {self.logit_std:g}")
        check_shift(self.shift)
        low, high = MODE_SCALES
        if not low <= self.mode_scale <= high:
            raise ValueError(f"mode_scale must be at least {low:g} and at most {high:.6g}; got {self.mode_scale:g}")

    @classmethod
    def of_section(cls, settings: FlowSection, num_tokens: int) -> TimeSampler:
        """The distribution of a recipe for images of `num_tokens` tokens. Raises ValueError on invalid settings."""
        return cls(
            settings.time_sampler,
            settings.logit_mean,
            settings.logit_std,
            settings.mode_scale,
            shift_for(settings, num_tokens),
        )

    @property
    def mirrored(self) -> TimeSampler:
        """The distribution of 1 - sigma."""
        low, high = self.within
        return replace(self, logit_mean=-self.logit_mean, shift=1 / self.shift, within=(1 - high, 1 - low))

    def sigma(self, u: np.ndarray) -> np.ndarray:
        """Noise levels from uniform u in (0, 1), float64."""
        if self.within == (0.0, 1.0):
            return self._whole(u)
        first, last = (self._share(level) for level in self.within)
        return np.clip(self._whole(first + (last - first) * u), *self.within)

    def _share(self, level: float) -> float:
        """The u whose noise level is `level`, by bisection."""
        low, high = 0.0, 1.0
        rising = bool(self._whole(np.array(0.75)) > self._whole(np.array(0.25)))
        if level in (0.0, 1.0):
            return float(rising == bool(level))
        for _ in range(60):
            middle = (low + high) / 2
            below = bool(self._whole(np.array(middle)) < level)
            low, high = (middle, high) if below == rising else (low, middle)
        return (low + high) / 2

    def _whole(self, u: np.ndarray) -> np.ndarray:
        """Noise levels without `within`."""
        if self.kind == "uniform":
            sigma = u
        elif self.kind == "logit_normal":
            sigma = np.asarray(expit(self.logit_mean + self.logit_std * ndtri(u)))
        elif self.kind == "mode":
            sigma = 1 - u - self.mode_scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        else:
            sigma = 1 - 1 / (np.tan(np.pi / 2 * u) + 1)
        return shifted(sigma, self.shift)
