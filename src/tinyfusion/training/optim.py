"""AdamW with parameter groups, and the learning-rate schedule: exact at both ends for any length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tinyfusion.core.recipe import TrainingSection


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that ask for gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class ParameterGroup:
    """Named parameters that share a learning rate (None: the section's); `constant` exempts them from the schedule."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None
    constant: bool = False


def adamw(groups: Sequence[ParameterGroup], settings: TrainingSection) -> torch.optim.AdamW:
    """AdamW over the groups that hold anything. Raises ValueError where none does."""
    listed = []
    for group in groups:
        rate = settings.learning_rate if group.learning_rate is None else group.learning_rate
        values = list(group.parameters.values())
        if values:
            listed.append({"params": values, "lr": rate, "base": rate, "constant": group.constant})
    if not listed:
        raise ValueError("nothing to train: no parameter group holds a parameter")
    return torch.optim.AdamW(
        listed, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


def linear(ends: tuple[float, float], step: int, steps: int) -> float:
    """From ends[0] at step 0 to ends[1] at step `steps - 1` and after; ends[0] where there is one step only."""
    share = min(step / max(steps - 1, 1), 1.0) if steps > 1 else 0.0
    return ends[1] if share == 1 else ends[0] + (ends[1] - ends[0]) * share  # rounding must not miss the end


def learning_rate_factor(settings: TrainingSection, step: int) -> float:
    """The learning rate at `step` as a share of its peak: linear warm-up, then cosine to `learning_rate_end`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.learning_rate_end is None:
        return 1.0
    floor = settings.learning_rate_end / settings.learning_rate
    progress = min((step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps - 1, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
