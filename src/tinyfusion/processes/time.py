"""Time of a flow: noise levels, the distribution that training draws them from, their shift, and how families write them.

One convention holds inside the flow process. The noise level sigma runs from 0 (data) to 1 (noise), on the straight path
x_sigma = (1 - sigma) x0 + sigma noise, and a velocity is dx/dsigma, there noise - x0. `TimeConvention` translates the time
and the velocity of a family's network to it and back.

Everything here is closed under exchange of noise and data (1 - sigma in place of sigma): the mean of a logit-normal
distribution changes its sign, a shift s becomes 1 / s, and the rest stays. Times are therefore drawn in the direction in which
a family counts them, and none loses digits by being subtracted from 1.

Sources: Esser et al., arXiv 2403.03206, sections 3.1 (densities) and 5.3.2 (shift); Black Forest Labs, FLUX (shift by the
number of tokens).
Differs: noise levels are continuous; training code that follows diffusers rounds them down to one of 1,000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from scipy.special import expit, logit, ndtri
from torch import Tensor

from tinyfusion.config.process_sections import FlowSection, ShiftFields

Density = Literal["uniform", "logit_normal", "mode", "cosmap"]
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # of the mode density, for which its transform is monotone
SHIFTS = (1e-6, 1e6)  # far beyond any use
_BISECTIONS = 60  # halve (0, 1) down to the resolution of float64
Share = TypeVar("Share", float, np.ndarray, Tensor)


# ---------------------------------------------------------------------------------------------------------- conventions


class Level(NamedTuple):
    """Noise levels: sigma, 1 at noise, and `clean` = 1 - sigma. Both are stored: a small one cannot be found from the other."""

    sigma: Tensor
    clean: Tensor


@dataclass(frozen=True)
class TimeConvention:
    """How a family writes the time and the velocity of a flow.

    time: what its network is given, times `scale`. velocity: what its network returns on the straight path, with "data" for x0.
    Raises ValueError on anything else.
    """

    time: Literal["sigma", "1 - sigma"] = "sigma"
    scale: float = 1.0
    velocity: Literal["noise - data", "data - noise"] = "noise - data"

    def __post_init__(self) -> None:
        known = (("time", ("sigma", "1 - sigma")), ("velocity", ("noise - data", "data - noise")))
        for name, choices in known:
            if getattr(self, name) not in choices:
                raise ValueError(f"the {name} of a flow is {' or '.join(choices)}; got {getattr(self, name)!r}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of time must be above 0; got {self.scale:g}")

    def level(self, t: Tensor) -> Level:
        """The noise level at the family's time t."""
        share = t / self.scale
        return Level(share, 1 - share) if self.time == "sigma" else Level(1 - share, share)

    def sigma(self, t: float) -> float:
        """The same of one number: sigma alone."""
        return t / self.scale if self.time == "sigma" else 1 - t / self.scale

    def at_clean(self, clean: Share) -> Share:
        """The family's time at the noise level 1 - `clean`."""
        return self.scale * (1 - clean if self.time == "sigma" else clean)

    def at_sigma(self, sigma: Share) -> Share:
        """The family's time at a noise level."""
        return self.scale * (sigma if self.time == "sigma" else 1 - sigma)

    def velocity_of(self, output: Tensor) -> Tensor:
        """dx/dsigma from the output of a velocity network, or the output from it: the translation is its own inverse."""
        return output if self.velocity == "noise - data" else -output

    def draw(self, times: TimeSampler, u: np.ndarray, clean_ends: tuple[float, float]) -> np.ndarray:
        """The family's times that `times` makes of uniform u in (0, 1), scaled to lie between two shares of 1 - sigma."""
        low, high = clean_ends
        if self.time == "sigma":
            low, high = 1 - high, 1 - low
        else:
            times = times.mirrored
        return self.scale * (low + (high - low) * times.sigma(u))


DATA_AT_ONE = TimeConvention("1 - sigma", 1.0, "data - noise")


# ---------------------------------------------------------------------------------------------------------------- shift


def shifted(sigma: Share, shift: float) -> Share:
    """s sigma / (1 + (s - 1) sigma): 0 and 1 stay, s above 1 moves all else towards noise. The inverse is that of 1 / s.

    In a form whose rounding never leaves [0, 1] and is none at s = 1.
    """
    moved = shift * sigma
    return moved / (moved + (1 - sigma))


def shift_for(settings: ShiftFields, num_tokens: int) -> float:
    """The s of `shifted` that a recipe gives images of so many tokens. ValueError where it is outside of `SHIFTS`.

    static: s itself. exponential, linear: s = exp(mu), s = mu, where mu is linear in the number of tokens through
    (base_tokens, base_shift) and (max_tokens, max_shift), also beyond these two.
    """
    if settings.shift_type == "static":
        return settings.shift
    slope = (settings.max_shift - settings.base_shift) / (settings.max_tokens - settings.base_tokens)
    mu = settings.base_shift + slope * (num_tokens - settings.base_tokens)
    shift = math.exp(min(mu, 700.0)) if settings.shift_type == "exponential" else mu
    check_shift(shift, f"the shift of shift_type {settings.shift_type} at {num_tokens} tokens (mu {mu:g})")
    return shift


def check_shift(shift: float, name: str = "a shift") -> None:
    """ValueError on an s that is none."""
    low, high = SHIFTS
    if not low <= shift <= high:
        raise ValueError(f"{name} must be at least {low:g} and at most {high:g}; got {shift:g}")


def sigma_grid(num_points: int, shift: float = 1.0, terminal: float | None = None) -> np.ndarray:
    """(num_points,) falling noise levels from 1 to 0, float64: even ones, shifted.

    terminal: the last level before 0. All from 1 to there are then stretched, in 1 - sigma, to end at it.
    """
    sigmas = shifted(np.linspace(1.0, 0.0, num_points), shift)
    if terminal is not None:
        clean = 1 - sigmas[:-1]
        sigmas[:-1] = 1 - clean * ((1 - terminal) / clean[-1])
    return sigmas


# ------------------------------------------------------------------------------------------------------------ densities


@dataclass(frozen=True)
class TimeSampler:
    """The distribution of noise levels in training: sigma as a function of one uniform number, and its density.

    With z the standard normal quantile of u, and before the shift s of `shifted`:

        uniform       sigma = u
        logit_normal  sigma = 1 / (1 + exp(-(logit_mean + logit_std z)))
        mode          sigma = 1 - u - mode_scale (cos^2(pi u / 2) - 1 + u)
        cosmap        sigma = 1 - 1 / (tan(pi u / 2) + 1)

    All are monotone in u, so a stratified u gives stratified noise levels. Raises ValueError on parameters that cannot be.
    """

    kind: Density = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Density):
            raise ValueError(f"unknown time sampler {self.kind!r}; there is {', '.join(get_args(Density))}")
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
        """The distribution that a recipe gives images of so many tokens. ValueError where it gives none."""
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
        return replace(self, logit_mean=-self.logit_mean, shift=1 / self.shift)

    def sigma(self, u: np.ndarray) -> np.ndarray:
        """Noise levels from uniform u in (0, 1), float64."""
        return shifted(self._unshifted(u), self.shift)

    def _unshifted(self, u: np.ndarray) -> np.ndarray:
        if self.kind == "uniform":
            return u
        if self.kind == "logit_normal":
            return np.asarray(expit(self.logit_mean + self.logit_std * ndtri(u)))
        if self.kind == "mode":
            return 1 - u - self.mode_scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        return 1 - 1 / (np.tan(np.pi / 2 * u) + 1)

    def density(self, sigma: np.ndarray) -> np.ndarray:
        """The probability density at noise levels in (0, 1)."""
        before = shifted(sigma, 1 / self.shift)
        slope = self.shift / (self.shift + (1 - self.shift) * sigma) ** 2  # of `before`, by sigma
        return self._unshifted_density(before) * slope

    def _unshifted_density(self, sigma: np.ndarray) -> np.ndarray:
        if self.kind == "uniform":
            return np.ones_like(sigma)
        if self.kind == "logit_normal":
            z = (logit(sigma) - self.logit_mean) / self.logit_std
            return np.exp(-(z**2) / 2) / (self.logit_std * math.sqrt(2 * math.pi) * sigma * (1 - sigma))
        if self.kind == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        low, high = (
            np.zeros_like(sigma),
            np.ones_like(sigma),
        )  # u of the mode density has no closed form: it falls with sigma
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = self._unshifted(middle) > sigma
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return 1 / (1 + self.mode_scale * (1 - math.pi / 2 * np.sin(math.pi * low)))
