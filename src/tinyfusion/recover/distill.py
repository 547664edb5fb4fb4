"""DistilledObjective: an Objective that wraps an Objective; the loop cannot tell.

Teacher and student see the same noise, timesteps and label drops because both read one `NoisyBatch`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfusion.core.rng import Draws
from tinyfusion.models.stack import BlockStack
from tinyfusion.processes.base import Batch, NoisyBatch, Prediction
from tinyfusion.processes.gaussian import GaussianObjective, mean_flat, split_output
from tinyfusion.recover.terms import MaskRule, masked_feature_loss, mean_over_pairs
from tinyfusion.training.optim import linear


@dataclass(frozen=True)
class DistilledObjective:
    """alpha_kd * kd_loss + (1 - alpha_kd) * gt + beta * feat_loss, per sample.

    kd_loss = noise MSE against the teacher + KL(teacher's step || student's step) in bits, which trains the variance
    alone and falls back to the data likelihood at t = 0 (as published). feat_loss: masked feature loss, mean over
    `pairs` of (student block, teacher block). beta falls linearly over `steps`. Where student or teacher has no learned
    variance the KL is left out. Source: arXiv 2412.01199, equation 6 and its released code.
    """

    inner: GaussianObjective
    teacher: nn.Module
    teacher_stack: BlockStack
    student_stack: BlockStack
    pairs: list[tuple[int, int]]
    steps: int
    alpha_kd: float = 0.9
    beta: tuple[float, float] = (1e-2, 0.0)
    sigmas: float | None = 2.0
    mask: MaskRule = "own"

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        """The inner draws."""
        return self.inner.draw(batch, draws)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        """Student and teacher on the same batch, with the features of the paired blocks."""
        with torch.no_grad(), self.teacher_stack.tap([t for _, t in self.pairs]) as teacher_features:
            taught = self.inner.predict(self.teacher, noisy)
        with self.student_stack.tap([s for s, _ in self.pairs]) as student_features:
            own = self.inner.predict(model, noisy)
        taught = dataclasses.replace(taught, features=teacher_features)
        return dataclasses.replace(own, features=student_features, teacher=taught)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """loss, gt (with mse and vb), kd_loss (with vb_kd), feat_loss without its weight."""
        assert prediction.teacher is not None
        own = self.inner.losses(model, noisy, prediction)
        kd = self._output_loss(noisy, prediction.output, prediction.teacher.output)
        features = mean_over_pairs(
            [
                masked_feature_loss(
                    prediction.features[s].float(), prediction.teacher.features[t].float(), self.sigmas, self.mask
                )
                for s, t in self.pairs
            ]
        )
        beta = linear(self.beta, noisy.step, self.steps)
        loss = self.alpha_kd * kd["kd_loss"] + (1 - self.alpha_kd) * own["loss"] + beta * features
        rest = {name: value for name, value in own.items() if name != "loss"}
        return {"loss": loss, "gt": own["loss"], **rest, **kd, "feat_loss": features}

    def _output_loss(self, noisy: NoisyBatch, student_output: Tensor, teacher_output: Tensor) -> dict[str, Tensor]:
        channels = noisy.x0.shape[1]
        noise, v = split_output(student_output, channels)
        taught_noise, taught_v = split_output(teacher_output.detach(), channels)
        mse_kd = mean_flat((noise - taught_noise) ** 2)
        if v is None or taught_v is None:
            return {"kd_loss": mse_kd}
        step = self.inner.schedule.model_gaussian(taught_noise, taught_v, noisy.xt, noisy.t, clip=False)
        vb_kd = self.inner.variational_bits(noisy, noise, v, target=(step.mean, step.log_variance))
        return {"kd_loss": mse_kd + vb_kd, "vb_kd": vb_kd}
