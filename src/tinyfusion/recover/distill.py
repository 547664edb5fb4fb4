"""DistilledObjective: an Objective that wraps an Objective; the loop cannot tell.

Teacher and student see the same noise, timesteps and label drops because both read one `NoisyBatch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.config.recipe import RecoverSection
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, Process, StepMemory
from tinyfusion.recover.align import Pairs
from tinyfusion.recover.terms import MaskRule, masked_feature_loss, mean_over_pairs
from tinyfusion.training.optim import linear


@dataclass(frozen=True)
class TaughtPrediction(Prediction):
    """The student's output, the teacher's beside it, and what was compared while the student ran: (B,) per pair."""

    feature_losses: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class DistilledObjective(Objective):
    """alpha_kd * kd_loss + (1 - alpha_kd) * gt + beta * feat_loss, per sample.

    kd_loss: of the outputs, as the process has it. feat_loss: masked feature loss, mean over `pairs` of (student block,
    teacher block). beta falls linearly over `steps`; where both its ends are 0 there is no feature term, and no block is
    watched.
    Source: arXiv 2412.01199, equation 6 and its released code.
    """

    inner: Process
    teacher: nn.Module
    teacher_stack: BlockStack
    student_stack: BlockStack
    pairs: Pairs
    steps: int
    alpha_kd: float = 0.9
    beta: tuple[float, float] = (1e-2, 0.0)
    sigmas: float | None = 2.0
    mask: MaskRule = "own"
    channels: Tensor | None = None

    def __post_init__(self) -> None:
        for side, stack in enumerate((self.student_stack, self.teacher_stack)):
            blocks = sorted(pair[side] for pair in self.pairs)
            if len(set(blocks)) < len(blocks) or (blocks and not 0 <= blocks[0] <= blocks[-1] < len(stack)):
                who = ("student", "teacher")[side]
                raise ValueError(
                    f"pairs name blocks {blocks} of the {who}: wanted distinct ones of 0 to {len(stack) - 1}"
                )

    @property
    def compares_features(self) -> bool:
        """Whether there is a feature term."""
        return max(self.beta) > 0

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        """The inner draws."""
        return self.inner.draw(batch, draws)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> TaughtPrediction:
        """Teacher and student on the same batch; paired blocks are compared as the student reaches them."""
        watched = [t for _, t in self.pairs] if self.compares_features else []
        with torch.no_grad(), self.teacher_stack.tap(watched) as taught_features:
            taught = self.inner.predict(self.teacher, noisy)
        with self._comparing(taught_features) as losses:
            own = self.inner.predict(model, noisy)
        return TaughtPrediction(own.output, teacher=taught, feature_losses=losses)

    @contextmanager
    def _comparing(self, taught: dict[int, Tensor]) -> Iterator[list[Tensor]]:
        """Take the feature loss of a pair when the student's block is done, and let go of the teacher's feature."""
        losses: list[Tensor] = []
        teacher_of = dict(self.pairs) if self.compares_features else {}

        def compare(block: int, _before: Tensor, after: Tensor) -> None:
            losses.append(self.feature_loss(after, taught.pop(teacher_of[block])))

        with self.student_stack.watched(list(teacher_of), compare):
            yield losses

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B,) of one pair of block outputs (B, T, D); of the teacher's only `channels`, where the student is narrower."""
        if self.channels is not None:
            teacher = teacher.index_select(-1, self.channels)
        return masked_feature_loss(student, teacher, self.sigmas, self.mask)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """loss, gt (with its parts), kd_loss (with its parts), and feat_loss without its weight where features count."""
        assert isinstance(prediction, TaughtPrediction) and prediction.teacher is not None
        own = self.inner.losses(model, noisy, prediction)
        kd = self.inner.kd_terms(noisy, prediction, prediction.teacher)
        loss = self.alpha_kd * kd["kd_loss"] + (1 - self.alpha_kd) * own["loss"]
        features: dict[str, Tensor] = {}
        if self.compares_features:
            features["feat_loss"] = mean_over_pairs(prediction.feature_losses)
            loss = loss + linear(self.beta, noisy.step, self.steps) * features["feat_loss"]
        rest = {name: value for name, value in own.items() if name != "loss"}
        return {"loss": loss, "gt": own["loss"], **rest, **kd, **features}

    def step_memory(self) -> StepMemory:
        """The teacher, and its features where they are compared."""
        features = len(self.pairs) if self.compares_features else 0
        return StepMemory(teacher=(self.teacher, self.teacher_stack), features=features)


def distilled(
    settings: RecoverSection,
    inner: Process,
    teacher: LoadedModel,
    student: LoadedModel,
    pairs: Pairs,
    channels: list[int] | None = None,
) -> DistilledObjective:
    """The terms of a method: logits-kd compares outputs alone, rep-kd every feature, masked-kd those that are calm.

    channels: the teacher's residual channel for each of a narrower student's. Raises ValueError where `pairs` do not
    fit the two models. (finetune is `inner` itself.)
    """
    return DistilledObjective(
        inner=inner,
        teacher=teacher.module,
        teacher_stack=teacher.stack,
        student_stack=student.stack,
        pairs=pairs,
        steps=settings.training.steps,
        alpha_kd=settings.alpha_kd,
        beta=settings.beta if settings.compares_features else (0.0, 0.0),
        sigmas=settings.mask_sigmas if settings.method == "masked-kd" else None,
        mask=settings.mask,
        channels=None if channels is None else torch.tensor(channels, device=next(teacher.module.parameters()).device),
    )
