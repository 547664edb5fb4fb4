"""Classifier-free guidance of an output. Source: Ho & Salimans, arXiv 2207.12598."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyfusion.conditioning.condition import Condition, ModelCall, concat


def mix_guidance(both: Tensor, scale: float, channels: int) -> Tensor:
    """The guided output from the conditional and the unconditional half of a batch."""
    cond, uncond = both.chunk(2)
    mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([mixed, cond[:, channels:]], dim=1)


def guided_call(
    call: ModelCall, model: nn.Module, x: Tensor, t: Tensor, condition: Condition, scale: float, channels: int
) -> Tensor:
    """The model's output under guidance on the first `channels` channels, in one pass over both halves; scale 1: conditional."""
    if scale == 1:
        return call(model, x, t, condition)
    both = call(model, torch.cat([x, x]), torch.cat([t, t]), concat([condition, condition.null()]))
    return mix_guidance(both, scale, channels)
