"""Phased consistency: in each of N phases of the noise levels, every point of a trajectory of the teacher leads to the phase's end.

Shapes: B images, C channels, N phases. Source: Wang et al., arXiv 2405.18407 (PCM); Song et al., arXiv 2303.01469.
Differs: the network keeps its own parametrisation, and the loss is on its output, so no boundary condition has to be built in;
the target is the student itself without a gradient (as in arXiv 2310.14189), not its moving average; there is no adversary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
    end_power: of the weight of an error, which is how far the end of the phase moves with the output, over the mean of it: 0 leaves
    errors of the output, 2 makes them errors of the end.
    """

    teacher: GuidedTeacher
    levels: tuple[float, ...]
    teacher_steps: int = 48
    end_power: float = 1.0

    @property
    def steps_per_phase(self) -> int:
        """Steps of the teacher within a phase."""
        return max(1, round(self.teacher_steps / len(self.levels)))

    def level(self, phase: np.ndarray, done: np.ndarray | int) -> np.ndarray:
        """Noise levels after `done` steps of the teacher in these phases."""
        edges = np.append(self.levels, 0.0)
        begin, end, each = edges[phase], edges[phase + 1], self.steps_per_phase
        return np.where(done == each, end, begin - (begin - end) * done / each)

    @cached_property
    def mean_weight(self) -> float:
        """Mean of the weights over all levels that are drawn."""
        phase, done = np.divmod(np.arange(len(self.levels) * self.steps_per_phase), self.steps_per_phase)
        at, end = (self.teacher.noising.times(self.level(phase, steps)) for steps in (done, self.steps_per_phase))
        return float((self.teacher.noising.moved_per_output(at, end) ** self.end_power).mean())

    def draw(self, batch: Batch, draws: Draws) -> PhasedBatch:
        each = self.steps_per_phase
        phase = (np.arange(draws.first, draws.first + draws.num) + draws.step) % len(self.levels)
        done = draws.integers("timestep", each)
        device, times = batch.x.device, self.teacher.noising.times
        t, later, last = (times(self.level(phase, steps)).to(device) for steps in (done, done + 1, each))
        noise = torch.from_numpy(draws.normal("noise", tuple(batch.x.shape[1:]))).to(device)
        return PhasedBatch(**vars(self.teacher.noised(batch, t, noise, draws.step)), after=later, end=last)

    def predict(self, model: nn.Module, noisy: PhasedBatch) -> PhasedPrediction:
        """One step of the teacher, the student from there to the end of the phase, and the student from here."""
        teacher, noising, x, t, condition = self.teacher, self.teacher.noising, noisy.xt, noisy.t, noisy.condition
        with torch.no_grad():
            further = noising.mixed(teacher.parts(x, t, condition), noisy.after)
            ended = (noisy.after == noisy.end).view(-1, *[1] * (x.ndim - 1))
            # the network is not run at the data, where a time may not be one of its own
            at = torch.where(noisy.after == noisy.end, t, noisy.after)
            landed = noising.mixed(teacher.own(model, further, at, condition), noisy.end)
            landed = torch.where(ended, further, landed)
            target = noising.target(noising.between(x, t, landed, noisy.end), t)
        return PhasedPrediction(teacher.call(model, x, t, condition), target=target)

    def losses(self, model: nn.Module, noisy: PhasedBatch, prediction: PhasedPrediction) -> dict[str, Tensor]:
        """Per-sample "loss", weighted."""
        output = prediction.output[:, : noisy.x0.shape[1]].float()
        weight = self.teacher.noising.moved_per_output(noisy.t, noisy.end) ** self.end_power / self.mean_weight
        return {"loss": weight * mean_flat((output - prediction.target) ** 2)}

    def step_memory(self) -> StepMemory:
        return StepMemory(**self.teacher.memory)
