"""Exponential moving average of named parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinyfusion.training.shards import is_sharded, local_part, whole

HORIZON_REMAINDER = 0.05  # share of the initial weights in the average above which a run counts as too short


class Ema:
    """e <- decay * e + (1 - decay) * p, once per step, started from p. Holds only the parameters it is given.

    The average of a sharded parameter is sharded alike, and every process updates its own shard.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1); got {decay}")
        self.decay = decay
        self.parameters = dict(parameters)
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        averages = [local_part(average) for average in self.average.values()]
        current = [local_part(p) for p in self.parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the averages into the parameters of `module` that have their names. Raises KeyError where one is missing.

        Every process must call where averages are sharded.
        """
        parameters = dict(module.named_parameters())
        for name, value in self.average.items():
            if is_sharded(parameters[name]):
                local_part(parameters[name]).copy_(local_part(value))
            else:
                parameters[name].copy_(whole(value))


def horizon_warning(decay: float, steps: int, section: str) -> str | None:
    """A sentence on what to do where the average would still hold more than 5 % of the initial weights; else None.

    section: of the recipe that sets this training, such as "recover.training".
    The published decay 0.9999 leaves 37 % after 10,000 steps (spec of arXiv 2412.01199, table 7 avoids it by sampling
    raw weights).
    """
    remainder = decay**steps
    if remainder <= HORIZON_REMAINDER:
        return None
    shortest = math.floor(1e4 * HORIZON_REMAINDER ** (1 / max(steps, 1))) / 1e4  # rounded down: the advice must suffice
    return (
        f"the moving average (decay {decay}) still holds {remainder:.0%} of the initial weights after {steps} steps: "
        f"--set {section}.ema_decay={shortest:g} or less, or train longer"
    )
