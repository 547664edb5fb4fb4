"""Distribution matching: a generator of few steps whose images have the distribution of its guided teacher's.

Shapes: B images, C channels, N steps. Where images of the generator are noised, the teacher's score says where such images are
denser in its own distribution, and a critic, trained on the generator's images alone, where they are denser in the generator's:
their difference is the gradient. No trajectory is copied, so no two images correspond.
Sources: Yin et al., arXiv 2311.18828 (DMD), 2405.14867 (DMD2: no regression, steps as they are sampled).
Differs: generator and critic are updated together, the critic at a higher rate, from one pass over the same noised images; no
adversary; the loss is in units of the network's output, so that the noisiest step does not outweigh the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.core.rng import Draws
from tinyfusion.few_steps.guided import GuidedTeacher
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, StepMemory, mean_flat
from tinyfusion.processes.noising import Mixture


@dataclass(frozen=True, kw_only=True)
class GeneratorBatch(NoisyBatch):
    """Noise and times for images that are yet to be generated; x0 and xt are data, which are not used.

    position (B,): the step that trains. noises (B, N, C, H, W): noise of every step, the first that of the start.
    """

    position: Tensor
    noises: Tensor


@dataclass(frozen=True, kw_only=True)
class GeneratorPrediction(Prediction):
    """The critic's output on the noised images; clean (B, C, H, W): generated, with a gradient; t (B,): of the step that trains.

    again: the generated images, noised. taught: the teacher's clean images there.
    """

    clean: Tensor
    step_times: Tensor
    again: NoisyBatch
    taught: Tensor


@dataclass(frozen=True)
class MatchingObjective(Objective):
    """The gradient of the divergence from the teacher's distribution for the generator, and the training loss for the critic.

    levels: (N,) noise levels of the generator's steps, falling. critic: a denoiser of generated images, whose parameters train too.
    within: noise levels at which the distributions are compared. fresh_noise: as in `FewSteps`.
    """

    teacher: GuidedTeacher
    critic: nn.Module
    levels: tuple[float, ...]
    within: tuple[float, float] = (0.02, 0.8)
    fresh_noise: bool = True

    def draw(self, batch: Batch, draws: Draws) -> GeneratorBatch:
        device, shape, steps = batch.x.device, tuple(batch.x.shape[1:]), len(self.levels)
        low, high = self.within
        t = self.teacher.noising.times(low + (high - low) * draws.uniform("timestep")).to(device)
        noise = torch.from_numpy(draws.normal("noise", shape)).to(device)
        noises = torch.from_numpy(draws.normal("generator-noise", (steps, *shape))).to(device)
        turn = (np.arange(draws.first, draws.first + draws.num) + draws.step) % steps
        position = torch.from_numpy(turn).to(device)
        own = NoisyBatch(batch.x, noise, batch.x, t, batch.condition, draws.step)
        return GeneratorBatch(**vars(own), position=position, noises=noises)

    def generated(self, model: nn.Module, noisy: GeneratorBatch) -> tuple[Tensor, Tensor]:
        """(clean images with the gradient of the step that trains, its times); the steps before run without one."""
        teacher, noising = self.teacher, self.teacher.noising
        times = noising.times(np.array(self.levels)).to(noisy.device)
        x = noisy.noises[:, 0]
        with torch.no_grad():
            for k in range(len(times) - 1):
                going = (noisy.position > k).nonzero().squeeze(1)
                # one row where none goes on: processes that share the model's weights must all call it as often
                rows = going if len(going) else torch.zeros(1, dtype=going.dtype, device=going.device)
                parts = teacher.own(model, x[rows], times[k].expand(len(rows)), noisy.condition.index(rows))
                if len(going):
                    noise = noisy.noises[going, k + 1] if self.fresh_noise else parts.noise
                    after = noising.mixed(Mixture(parts.clean, noise), times[k + 1].expand(len(going)))
                    x = x.index_copy(0, going, after)
        t = times[noisy.position]
        return teacher.own(model, x, t, noisy.condition).clean, t

    def predict(self, model: nn.Module, noisy: GeneratorBatch) -> GeneratorPrediction:
        """Generate, noise the images again, and run critic and teacher there."""
        clean, step_times = self.generated(model, noisy)
        generated = Batch(clean.detach(), noisy.condition)
        again = self.teacher.noised(generated, noisy.t, noisy.noise, noisy.step)
        output = self.teacher.call(self.critic, again.xt, again.t, again.condition)
        taught = self.teacher.parts(again.xt, again.t, again.condition).clean
        return GeneratorPrediction(output, clean=clean, step_times=step_times, again=again, taught=taught)

    def losses(self, model: nn.Module, noisy: GeneratorBatch, prediction: GeneratorPrediction) -> dict[str, Tensor]:
        """Per-sample "loss", its terms "generator_loss" and "critic_loss", and "score_gap", the size of the gradient in x_0."""
        again, noising, clean = prediction.again, self.teacher.noising, prediction.clean.detach()
        error = prediction.output[:, : clean.shape[1]].float() - noising.target(Mixture(clean, again.noise), again.t)
        critic_loss = mean_flat(error**2)
        fake = noising.parts(prediction.output.detach(), again.xt, again.t).clean
        size = mean_flat((clean - prediction.taught).abs()).clamp(min=1e-6).view(-1, *[1] * (clean.ndim - 1))
        gap = (fake - prediction.taught) / size
        at_data = noising.times(np.zeros(len(clean))).to(clean.device)
        scale = (1 / noising.moved_per_output(prediction.step_times, at_data)).clamp(max=1)
        generator_loss = 0.5 * mean_flat((prediction.clean - (clean - gap)) ** 2) * scale
        terms = {"generator_loss": generator_loss, "critic_loss": critic_loss, "score_gap": mean_flat(gap.abs())}
        return {"loss": generator_loss + critic_loss, **terms}

    def step_memory(self) -> StepMemory:
        return StepMemory(**self.teacher.memory, passes=2)
