"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as a wrapper around a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyfusion.processes.gaussian import Denoiser


def conditional(model: nn.Module, labels: Tensor) -> Denoiser:
    """The model with its labels bound: (x, t) -> output."""
    return lambda x, t: model(x, t, labels)


def guided(model: nn.Module, labels: Tensor, null_label: int, scale: float, channels: int) -> Denoiser:
    """Guidance on the first `channels` output channels; all others (variance among them) keep their conditional values.

    noise = uncond + scale * (cond - uncond). One forward pass over the doubled batch, conditional half first. The
    published DiT guides min(3, C) of its C noise channels; scale 1 is the conditional model and runs undoubled.
    Differs from the published wrapper, which carries the guided half twice: only the conditional half is returned.
    """
    if scale == 1.0:
        return conditional(model, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([mixed, cond[:, channels:]], dim=1)

    return denoise
