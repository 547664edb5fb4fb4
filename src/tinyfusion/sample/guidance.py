"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) as a wrapper around a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition, concat
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import Denoiser

WHOLE = (0.0, 1.0)  # the interval of guidance that holds all times


def check_guidance(scale: float, interval: tuple[float, float]) -> None:
    """ValueError on a scale below 1 and on an interval that is none."""
    if scale < 1:
        raise ValueError(f"guidance must be at least 1 (1 runs the conditional model alone); got {scale:g}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"a guidance interval is two rising shares in [0, 1]; got {low:g} and {high:g}")


def guided_channels(model: LoadedModel, all_channels: bool) -> int:
    """Leading output channels of `model` under guidance: the family's published ones, or all that are no variance."""
    channels = int(model.arch.in_channels)
    published = model.family.guided_channels
    return channels if all_channels or published is None else min(published, channels)


def described(scale: float, channels: int, rule: str, interval: tuple[float, float]) -> str:
    """Guidance in the words of the protocol string."""
    said = f"guidance {scale:g} on {channels} channel{'s' * (channels > 1)} ({rule})"
    return said + (f" in [{interval[0]:g}, {interval[1]:g}]" if scale > 1 and interval != WHOLE else "")


def conditional(model: LoadedModel, condition: Condition) -> Denoiser:
    """The model with its condition bound: (x, t) -> output in float32, whatever the type of the weights."""
    module, inputs = model.module, model.family.inputs(condition)
    dtype = next(module.parameters()).dtype
    return lambda x, t: module(x.to(dtype), t, **inputs).float()


def guided(
    model: LoadedModel,
    condition: Condition,
    scale: float,
    channels: int,
    interval: tuple[float, float] = WHOLE,
    noise_share: Callable[[float], float] | None = None,
) -> Denoiser:
    """Guidance on the first `channels` output channels; all others (variance among them) keep their conditional values.

    output = uncond + scale * (cond - uncond). One forward pass over the doubled batch, conditional half first. The
    published models guide min(3, C) of their C channels; scale 1 is the conditional model and runs undoubled, and so
    does a time t (one for the whole batch) whose `noise_share`, 0 at the clean end and 1 at pure noise, lies outside of
    `interval`, ends included.
    Differs from the published wrapper, which carries the guided half twice: only the conditional half is returned.
    Source of the interval: Kynkaanniemi et al., arXiv 2404.07724; theirs is in noise levels.
    """
    if interval != WHOLE and noise_share is None:
        raise ValueError("an interval of guidance wants noise_share, which says where in it a time lies")
    alone = conditional(model, condition)
    if scale == 1.0:
        return alone
    pair = conditional(model, concat([condition, condition.null()]))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        # asking for the time makes the host wait for the device, so only where it matters
        if noise_share and interval != WHOLE and not interval[0] <= noise_share(float(t[0])) <= interval[1]:
            return alone(x, t)
        cond, uncond = pair(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([mixed, cond[:, channels:]], dim=1)

    return denoise
