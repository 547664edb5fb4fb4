"""Distillation terms, each a function to per-sample values (B,). Shapes: features (B, T, D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MaskRule = Literal["own", "joint"]


def massive_mask(features: Tensor, sigmas: float) -> Tensor:
    """Where |features - mean| < sigmas * std, per sample over tokens and width (unbiased variance, strict)."""
    flat = features.detach().float().flatten(1)
    deviation = flat - flat.mean(1, keepdim=True)
    variance = deviation.square().sum(1, keepdim=True) / (flat.shape[1] - 1)  # torch.std is several times slower here
    return (deviation.abs() < sigmas * variance.sqrt()).view(features.shape)


def masked_feature_loss(student: Tensor, teacher: Tensor, sigmas: float | None, rule: MaskRule = "own") -> Tensor:
    """(B,) mean squared difference of block outputs that leaves massive activations out; the denominator is always T D.

    own: each side is zeroed by its own mask, as released: where only the teacher is massive the student is pulled to 0,
    where only the student is, a constant without gradient remains. joint: only entries that are calm on both sides
    count, as the paper says. sigmas None masks nothing. Source: arXiv 2412.01199, section 3.4.
    """
    teacher = teacher.detach()
    if sigmas is None:
        return (student - teacher).square().flatten(1).mean(1)
    calm_student, calm_teacher = massive_mask(student, sigmas), massive_mask(teacher, sigmas)
    if rule == "joint":
        calm_student = calm_teacher = calm_student & calm_teacher
    return (calm_student * student - calm_teacher * teacher).square().flatten(1).mean(1)


def mean_over_pairs(losses: Sequence[Tensor]) -> Tensor:
    """(B,) average over pairs of blocks. Raises ValueError where there is none."""
    if not losses:
        raise ValueError("feature distillation needs at least one pair of blocks")
    return torch.stack(list(losses)).mean(0)
