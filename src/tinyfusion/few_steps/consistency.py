"""Phased consistency: in each of N phases of the noise levels, every point of a trajectory of the teacher leads to the phase's end.

Shapes: B images, C channels, N phases. Source: Wang et al., arXiv 2405.18407 (PCM); Song et al., arXiv 2303.01469.
Differs: the network keeps its own parametrisation, and the loss is on its output, so no boundary condition has to be built in;
the target is the student itself without a gradient (as in arXiv 2310.14189), not its moving average; there is no adversary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.core.rng import Draws
from tinyfusion.few_steps.guided import GuidedTeacher
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, StepMemory, mean_flat


@dataclass(frozen=True, kw_only=True)
class PhasedBatch(NoisyBatch):
    """A noised batch; after (B,): times after one step of the teacher; end (B,): of the end of the phase."""

    after: Tensor
    end: Tensor


@dataclass(frozen=True, kw_only=True)
class PhasedPrediction(Prediction):
    """The output, and the output (B, C, H, W) that leads to the same point as the trajectory's next point does."""

    target: Tensor


@dataclass(frozen=True)
class ConsistencyObjective(Objective):
    """Squared error between the student's output and the one that leads where its own prediction leads one teacher step further on.

    levels: (N,) noise levels at which phases begin, falling; a phase ends where the next begins, the last at the data.
    teacher_steps: DDIM steps of the teacher over all phases; each phase has as many. Images of a batch take the phases in turn.
    """

    teacher: GuidedTeacher
    levels: tuple[float, ...]
    teacher_steps: int = 48

    def draw(self, batch: Batch, draws: Draws) -> PhasedBatch:
        phases = len(self.levels)
        each = max(1, round(self.teacher_steps / phases))
        phase = (np.arange(draws.first, draws.first + draws.num) + draws.step) % phases
        edges = np.append(self.levels, 0.0)
        begin, end = edges[phase], edges[phase + 1]
        done = draws.integers("timestep", each)
        after = np.where(done == each - 1, end, begin - (begin - end) * (done + 1) / each)
        device, times = batch.x.device, self.teacher.noising.times
        t, later, last = (times(level).to(device) for level in (begin - (begin - end) * done / each, after, end))
        noise = torch.from_numpy(draws.normal("noise", tuple(batch.x.shape[1:]))).to(device)
        return PhasedBatch(**vars(self.teacher.noised(batch, t, noise, draws.step)), after=later, end=last)

    def predict(self, model: nn.Module, noisy: PhasedBatch) -> PhasedPrediction:
        """One step of the teacher, the student from there to the end of the phase, and the student from here."""
        teacher, noising, x, t, condition = self.teacher, self.teacher.noising, noisy.xt, noisy.t, noisy.condition
        with torch.no_grad():
            further = noising.mixed(teacher.parts(x, t, condition), noisy.after)
            ended = (noisy.after == noisy.end).view(-1, *[1] * (x.ndim - 1))
            # the network is not asked at the data, where a time may not be one of its own
            at = torch.where(noisy.after == noisy.end, t, noisy.after)
            landed = noising.mixed(teacher.own(model, further, at, condition), noisy.end)
            landed = torch.where(ended, further, landed)
            target = noising.target(noising.between(x, t, landed, noisy.end), t)
        return PhasedPrediction(teacher.call(model, x, t, condition), target=target)

    def losses(self, model: nn.Module, noisy: PhasedBatch, prediction: PhasedPrediction) -> dict[str, Tensor]:
        """Per-sample "loss"."""
        output = prediction.output[:, : noisy.x0.shape[1]].float()
        return {"loss": mean_flat((output - prediction.target) ** 2)}

    def step_memory(self) -> StepMemory:
        return StepMemory(teacher=(self.teacher.module, self.teacher.stack))
