"""Class labels as a condition: one int64 number per image, and K in place of a dropped one."""

from __future__ import annotations

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition

LABELS = "labels"  # the tensor of a condition of classes, (B,) int64


def class_condition(labels: Tensor, num_classes: int) -> Condition:
    """The condition of labels (B,) int64 in 0..K, K = `num_classes` being the null class."""
    return Condition({LABELS: labels}, {LABELS: torch.full((1,), num_classes, device=labels.device)})


def class_table(num_classes: int) -> Condition:
    """The table of classes 0 to K - 1: every label is its own row."""
    return class_condition(torch.arange(num_classes), num_classes)


def class_inputs(condition: Condition) -> dict[str, Tensor]:
    """The argument of a class-conditional model: its labels, as y."""
    return {"y": condition[LABELS]}
