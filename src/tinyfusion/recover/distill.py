"""Distillation as a training objective: a process's loss combined with terms against a teacher.

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
from tinyfusion.processes.base import (
    Batch,
    FoldedGuidance,
    NoisyBatch,
    Objective,
    Prediction,
    Process,
    StepMemory,
)
from tinyfusion.recover.align import Pairs
from tinyfusion.recover.terms import MaskRule, masked_feature_loss, mean_over_pairs
from tinyfusion.training.optim import linear


@dataclass(frozen=True)
class TaughtPrediction(Prediction):
    """The outputs of student and teacher, and the feature losses (B,) of their block pairs."""

    feature_losses: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class DistilledObjective(Objective):
    """The distillation loss alpha_kd * kd_loss + (1 - alpha_kd) * gt + beta * feat_loss, per sample.

    gt: the inner process's loss on the data. kd_loss: of the outputs, defined by the process. feat_loss: masked feature
    loss, mean over `pairs` of (student block, teacher block). beta falls linearly over `steps`; if it is 0 at both
    ends, features are not compared. guidance: the teacher's, which the student folds in; features are those with the condition.
    channels: the teacher's residual channels that a narrower student has. passing: bytes of a streamed teacher that are on the device
    at a time. Raises ValueError if `pairs` do not fit the models.
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
    passing: int = 0
    guidance: FoldedGuidance | None = None

    def __post_init__(self) -> None:
        for side, (who, stack) in enumerate((("student", self.student_stack), ("teacher", self.teacher_stack))):
            blocks = sorted(pair[side] for pair in self.pairs)
            if len(set(blocks)) < len(blocks) or (blocks and not 0 <= blocks[0] <= blocks[-1] < len(stack)):
                raise ValueError(
                    f"pairs name blocks {blocks} of the {who}: wanted distinct ones of 0 to {len(stack) - 1}"
                )

    @property
    def compares_features(self) -> bool:
        return max(self.beta) > 0

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        return self.inner.draw(batch, draws)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> TaughtPrediction:
        """Run the teacher, then the student, on the same batch; paired blocks are compared as the student runs them."""
        watched = [t for _, t in self.pairs] if self.compares_features else []
        with torch.no_grad(), self.teacher_stack.tap(watched) as taught_features:
            if self.guidance is None:
                taught = self.inner.predict(self.teacher, noisy)
            else:
                taught = self.inner.taught(self.teacher, noisy, self.guidance)
        with self._comparing(taught_features) as losses:
            own = self.inner.predict(model, noisy)
        return TaughtPrediction(own.output, teacher=taught, feature_losses=losses)

    @contextmanager
    def _comparing(self, taught: dict[int, Tensor]) -> Iterator[list[Tensor]]:
        """Compute the feature loss of a pair as soon as the student's block has run, and free the teacher's feature."""
        losses: list[Tensor] = []
        teacher_of = dict(self.pairs) if self.compares_features else {}

        def compare(block: int, _before: Tensor, after: Tensor) -> None:
            losses.append(self.feature_loss(after, taught.pop(teacher_of[block])[: len(after)]))

        with self.student_stack.watched(list(teacher_of), compare):
            yield losses

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The feature loss (B,) of one pair of block outputs (B, T, D)."""
        if self.channels is not None:
            teacher = teacher.index_select(-1, self.channels)
        return masked_feature_loss(student, teacher, self.sigmas, self.mask)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-sample loss, gt and kd_loss with their terms, and the unweighted feat_loss if features are compared."""
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
        features = len(self.pairs) if self.compares_features else 0
        rows = 1 if self.guidance is None else 2
        teacher = (self.teacher, self.teacher_stack)
        return StepMemory(teacher=teacher, teacher_rows=rows, features=features, passing=self.passing)


def distilled(
    settings: RecoverSection,
    inner: Process,
    teacher: LoadedModel,
    student: LoadedModel,
    pairs: Pairs,
    channels: list[int] | None = None,
    passing: int = 0,
    guidance: FoldedGuidance | None = None,
) -> DistilledObjective:
    """The objective of a distillation method of `settings`; fine-tuning uses `inner` itself.

    logits-kd compares outputs, rep-kd also features, masked-kd features without massive activations. channels: the
    teacher's residual channel for each of a narrower student's. passing, guidance: as in `DistilledObjective`.
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
        passing=passing,
        guidance=guidance,
    )
