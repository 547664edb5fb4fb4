"""Distillation terms: functions that return per-sample values (B,). Shapes: features (B, T, D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

MaskRule = Literal["own", "joint"]


def massive_mask(features: Tensor, sigmas: float) -> Tensor:
    """True where an activation is not massive: |features - mean| < sigmas * std (strict).

    Mean and std are per sample, over tokens and width; the variance is unbiased.
    """
    flat = features.detach().float().flatten(1)
    squares = (flat - flat.mean(1, keepdim=True)).square_()
    variance = squares.sum(1, keepdim=True) / (flat.shape[1] - 1)  # torch.std is several times slower here
    return (squares < sigmas**2 * variance).view(features.shape)


def masked_feature_loss(student: Tensor, teacher: Tensor, sigmas: float | None, rule: MaskRule = "own") -> Tensor:
    """(B,) mean squared difference of two block outputs without their massive activations.

    The denominator is always T D. own: each side is zeroed where it is massive itself, as released. An entry massive
    only in the teacher pulls the student to 0; one massive only in the student adds a constant without gradient. joint:
    an entry that is massive on either side does not count, as in the paper. sigmas None masks nothing. No gradient
    reaches the teacher; for the student's gradient one tensor (B, T, D) is retained. Source: arXiv 2412.01199, section
    3.4.
    """
    teacher = teacher.detach().float()
    loss: Tensor = _MaskedDifference.apply(student.float(), teacher, sigmas, rule)  # type: ignore[no-untyped-call]
    return loss


class _MaskedDifference(torch.autograd.Function):
    """mean((M_s s - M_t t)^2) per sample, with the gradient 2 M_s (M_s s - M_t t) / (T D).

    Generic operations would retain the difference, the mask and the teacher's features until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, sigmas: float | None, rule: MaskRule) -> Tensor:
        calm = None if sigmas is None else massive_mask(student, sigmas)
        if calm is None or sigmas is None:
            difference = student - teacher
        elif rule == "joint":
            calm &= massive_mask(teacher, sigmas)
            difference = (student - teacher).mul_(calm)
        else:
            difference = (calm * student).sub_(massive_mask(teacher, sigmas) * teacher)
        loss = difference.square().flatten(1).mean(1)
        if calm is not None and rule == "own":
            difference.mul_(calm)
        ctx.save_for_backward(difference)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        weight = gradients[0] * (2 / difference[0].numel())
        return difference * weight.view(-1, *[1] * (difference.ndim - 1)), None, None, None


def mean_over_pairs(losses: Sequence[Tensor]) -> Tensor:
    """(B,) average over pairs of blocks. Raises ValueError if there is none."""
    if not losses:
        raise ValueError("feature distillation needs at least one pair of blocks")
    return torch.stack(list(losses)).mean(0)
