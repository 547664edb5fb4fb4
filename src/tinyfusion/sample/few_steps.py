"""Sampling of models that were distilled for few steps: the steps of their own, without guidance.

Shapes: B images, C channels, S input side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.noising import FewSteps, Mixture, Noising, even_levels
from tinyfusion.sample.drive import SampleDraws, Sampler, conditional


@dataclass(frozen=True)
class FewStepSampler(Sampler):
    """The steps of a distilled model: predict the clean image, and mix it with noise at the next level."""

    noising: Noising
    steps: FewSteps
    guidance: float = 1.0  # folded in

    @property
    def calls(self) -> int:
        return len(self.steps.levels)

    def of_steps(self, num_steps: int) -> FewStepSampler:
        """Steps evenly spread below the same first level, for timing."""
        levels = even_levels(num_steps, self.steps.levels[0])
        return dataclasses.replace(self, steps=dataclasses.replace(self.steps, levels=levels))

    def describe(self, model: LoadedModel) -> str:
        how = "fresh noise" if self.steps.fresh_noise else "its own noise"
        return f"{self.steps.method}, {self.steps.describe()}, {how}"

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        denoiser, x = conditional(model, condition), draws.images(model)
        times = self.noising.times(np.array(self.steps.levels)).to(x.device)
        for k, time in enumerate(times):
            t = time.expand(len(x))
            parts = self.noising.parts(denoiser(x, t), x, t)
            if k + 1 == len(times):
                yield parts.clean
                return
            noise = draws.images(model, k) if self.steps.fresh_noise else parts.noise
            x = self.noising.mixed(Mixture(parts.clean, noise), times[k + 1].expand(len(x)))
            yield x

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """The last step."""
        denoiser, x = conditional(model, condition), draws.images(model)
        t = self.noising.times(np.array(self.steps.levels[-1:])).to(x.device).expand(len(x))
        return lambda: self.noising.parts(denoiser(x, t), x, t).clean
