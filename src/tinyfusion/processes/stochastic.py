"""SDE sampling of a flow, with the marginals of its ODE: dX = (v + w s) dc + sqrt(2 w) dW, c = 1 - noise level.

v is the velocity towards the data (with respect to c), s the score, w the *diffusion form*: half the noise variance per
unit of c, any non-negative function of the noise level. t and shapes as in `processes/flow.py`. The score enters as
w s = -(w / sigma) e, with e the noise from the network's output, which is finite at both ends of time.
Source: Ma et al., arXiv 2401.08740, section 2.3 and appendix; the forms are those of its code.
Differs: every form is possible and finite. `sbdm` on the linear and gvp paths starts at c = 1e-3 if the model would
start at 0, and Heun without a last step ends at 1 - 1e-3 if it would need the score of the data itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinyfusion.processes.base import Denoiser, StepNoise
from tinyfusion.processes.flow import SMALL_EPS, Flow
from tinyfusion.processes.integrate import check_points
from tinyfusion.processes.time import check_choice

DiffusionForm = Literal["sigma", "sbdm", "linear", "constant", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "euler", "tweedie", "none"]
StochasticMethod = Literal["euler", "heun"]


@dataclass(frozen=True)
class Stochastic:
    """Settings of SDE sampling.

    num_points: number of times from the start to the last step, both included; there are num_points - 1 even steps.
    form, norm: form and factor of w. last_step: the noise-free step of size L = `last_size` at the end: mean
    x + L (v + w s), euler x + L v, tweedie (x + sigma^2 s) / alpha, or none. Raises ValueError on anything else.
    """

    method: StochasticMethod = "euler"
    num_points: int = 250
    form: DiffusionForm = "sigma"
    norm: float = 1.0
    last_step: LastStep = "mean"
    last_size: float = 0.04

    def __post_init__(self) -> None:
        check_points(self.num_points)
        check_choice("stochastic method", self.method, StochasticMethod)
        check_choice("diffusion form", self.form, DiffusionForm)
        check_choice("last step", self.last_step, LastStep)
        if not (math.isfinite(self.norm) and self.norm >= 0):
            raise ValueError(f"the size of a diffusion form is at least 0; got {self.norm:g}")
        if self.last_step != "none" and not 0 < self.last_size < 0.5:
            raise ValueError(
                f"the last step is above 0 and below 0.5, or there is none (last_step none); got {self.last_size:g}"
            )

    def ends(self, flow: Flow, eps: float | None = None) -> tuple[float, float]:
        """The range of 1 - noise level of the even steps, before the last step. eps: as in `Flow.ends`."""
        start, end = flow.sampling_ends(eps)
        if self.form == "sbdm" and flow.path != "vp":
            start = start or SMALL_EPS
        if self.last_step != "none":
            return start, 1.0 - self.last_size
        return start, 1.0 - SMALL_EPS if end == 1.0 and self.method == "heun" else end

    def rate(self, flow: Flow, t: Tensor) -> Tensor:
        """The diffusion form w at t (B,), shaped (B, 1, 1, 1)."""
        at, level = flow.point(t), flow.convention.level(t.view(-1, 1, 1, 1))
        if self.form == "sigma":
            return self.norm * at.sigma
        if self.form == "sbdm":
            return self.norm * at.sigma * at.wronskian / at.alpha
        if self.form == "linear":
            return self.norm * level.sigma
        if self.form == "constant":
            return torch.full_like(level.sigma, self.norm)
        if self.form == "decreasing":
            return 0.25 * (self.norm * torch.cos(math.pi * level.clean) + 1) ** 2
        return self.norm * torch.sin(math.pi * level.clean) ** 2

    def drift(self, network: Denoiser, flow: Flow) -> Callable[[Tensor, Tensor], Tensor]:
        """The drift v + w s as a function of x and t; one call of the network per evaluation."""

        def drift(x: Tensor, t: Tensor) -> Tensor:
            output = network(x, t)
            strength = self.rate(flow, t) / flow.point(t).sigma
            return -flow.velocity(output, x, t) - strength * flow.noise(output, x, t)

        return drift

    @property
    def calls(self) -> int:
        steps = (self.num_points - 1) * (1 if self.method == "euler" else 2)
        return steps + (self.last_step != "none")


@torch.no_grad()
def sample_stochastic(
    network: Denoiser, flow: Flow, settings: Stochastic, x: Tensor, step_noise: StepNoise, eps: float | None = None
) -> Iterator[Tensor]:
    """SDE sampling from x (B, C, H, W) ~ N(0, 1): yields x after every step, the last step included.

    network(x, t): output with labels and guidance bound, t (B,). step_noise(j): noise of the j-th even step. Euler is
    Euler-Maruyama; Heun adds the noise first, followed by a deterministic Heun step.
    """
    start, end = settings.ends(flow, eps)
    shares = torch.linspace(start, end, settings.num_points, dtype=torch.float32, device=x.device)
    times = flow.convention.at_clean(shares)
    size = (end - start) / (settings.num_points - 1)
    drift = settings.drift(network, flow)
    for j in range(settings.num_points - 1):
        t = times[j].expand(len(x))
        noise = torch.sqrt(2 * settings.rate(flow, t) * size) * step_noise(j)
        if settings.method == "euler":
            x = x + size * drift(x, t) + noise
        else:
            x = x + noise
            first = drift(x, t)
            x = x + size / 2 * (first + drift(x + size * first, times[j + 1].expand(len(x))))
        yield x
    if settings.last_step == "none":
        return
    t = times[-1].expand(len(x))
    if settings.last_step == "mean":
        yield x + settings.last_size * drift(x, t)
        return
    output = network(x, t)
    if settings.last_step == "euler":
        yield x - settings.last_size * flow.velocity(output, x, t)
        return
    at = flow.point(t)
    yield (x - at.sigma * flow.noise(output, x, t)) / at.alpha
