"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as a wrapper around a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyfusion.processes.gaussian import NUM_TIMESTEPS, Denoiser

WHOLE = (0.0, 1.0)  # the interval of guidance that holds all timesteps


def conditional(model: nn.Module, labels: Tensor) -> Denoiser:
    """The model with its labels bound: (x, t) -> output in float32, whatever the weights are held in."""
    dtype = next(model.parameters()).dtype
    return lambda x, t: model(x.to(dtype), t, labels).float()


def guided(
    model: nn.Module,
    labels: Tensor,
    null_label: int,
    scale: float,
    channels: int,
    interval: tuple[float, float] = WHOLE,
) -> Denoiser:
    """Guidance on the first `channels` output channels; all others (variance among them) keep their conditional values.

    noise = uncond + scale * (cond - uncond). One forward pass over the doubled batch, conditional half first. The
    published DiT guides min(3, C) of its C noise channels; scale 1 is the conditional model and runs undoubled, and so
    does a timestep t (one for the whole batch) whose share t / 999 lies outside of `interval`, ends included.
    Differs from the published wrapper, which carries the guided half twice: only the conditional half is returned.
    Source of the interval: Kynkaanniemi et al., arXiv 2404.07724; theirs is in noise levels.
    """
    alone = conditional(model, labels)
    if scale == 1.0:
        return alone
    pair = conditional(model, torch.cat([labels, torch.full_like(labels, null_label)]))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # asking for the timestep makes the host wait for the device, so only where it matters
        if interval != WHOLE and not interval[0] <= float(t[0]) / (NUM_TIMESTEPS - 1) <= interval[1]:
            return alone(x, t)
        cond, uncond = pair(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([mixed, cond[:, channels:]], dim=1)

    return denoise
