"""What a dynamic model runs along a trajectory, for the pictures of its page: units per block and time, tokens per image.

`kept.json` in the run folder; the page is drawn from it without torch (docs/report.md).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.blocks.dynamics import BlockMasks, Deciding
from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.rng import Randomness
from tinyfusion.dynamic.macs import model_ratio, total_macs
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.process_specs import default_sampling, fits, sampler_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.macs import model_macs
from tinyfusion.sample.drive import SampleDraws, Sampler, image_labels, to_uint8

KEPT = "kept.json"
_NUM_IMAGES = 4
_NUM_TIMES = 8  # of the token maps
_SHOWN_CHANNELS = 3


class _Recording(Deciding):
    """Decides as at inference, at full cost, and remembers the time and the masks of every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.passes: list[dict[int, BlockMasks]] = []

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """A pass begins; `masks` is filled block by block."""
        super().begin(t, embedding)
        self.times.append(float(t[0]))
        self.passes.append(self.masks)


@torch.no_grad()
def dynamic_record(recipe: Recipe, model: LoadedModel) -> dict[str, Any]:
    """kept.json: heads, groups, tokens and blocks that ran at every time of the sampler, and which tokens of four images.

    The first four images of the recipe's sampling, whose sampler is that of the recipe, or the published one where the
    recipe's does not go with the model. Moves the model to the recipe's device.
    """
    routed = model.dynamic
    assert routed is not None
    sampler, device = _sampler(recipe.sample, model), device_for(recipe)
    model.module.to(device).eval()
    labels = image_labels(
        _NUM_IMAGES, len(model.conditions), recipe.seed, recipe.sample.labels, recipe.sample.label_rule == "balanced"
    )
    draws, recording = SampleDraws(Randomness(recipe.seed), 0, _NUM_IMAGES, device), _Recording()
    with routed.using(recording):
        condition = model.conditions.index(torch.from_numpy(labels)).to(device)
        x = deque(sampler.trajectory(model, condition, draws), maxlen=1).pop()
    sizes, settings, depth = routed.sizes, routed.settings, len(model.stack)
    ratios = [model_ratio(masks, sizes, _rows(masks)).mean() for masks in recording.passes]
    ratio = float(torch.stack(ratios).mean())
    static = model_macs(model)
    first = {time: i for i, time in reversed(list(enumerate(recording.times)))}  # its first pass, of every time
    times = list(dict.fromkeys(recording.times))
    shares = {
        name: _shares([recording.passes[first[time]] for time in times], name, depth)
        for name, wanted in (
            ("heads", settings.width), ("groups", settings.width), ("tokens", settings.tokens), ("gate", settings.depth)
        )
        if wanted
    }  # fmt: skip
    return {
        "protocol": f"{_NUM_IMAGES} images | {sampler.describe(model)} | float32 | seed {recipe.seed}",
        "times": [round(time, 6) for time in times],
        "num_units": sizes.num_heads,
        "shares": shares,
        "sub_networks": _different([recording.passes[first[time]] for time in times]),
        "ratio": ratio,
        "macs": total_macs(static, sizes, depth, ratio, settings.tokens),
        "static_macs": static,
        "maps": _token_maps(recording, x, labels, model) if settings.tokens else None,
    }


def _sampler(settings: SampleSection, model: LoadedModel) -> Sampler:
    """The sampler of the recipe, or the published one where that does not fit, such as DDIM for a flow."""
    return sampler_of(settings if fits(settings, model) else default_sampling(model), model)


def _rows(masks: dict[int, BlockMasks]) -> int:
    """Rows of the batch of a forward pass."""
    first = masks[0]
    return next(len(m) for m in (first.heads, first.tokens, first.gate) if m is not None)


def _shares(passes: list[dict[int, BlockMasks]], name: str, depth: int) -> list[list[float]]:
    """Per block and time, the share of units, or of tokens of all images, that ran."""
    shares = [[getattr(masks[block], name).float().mean().item() for masks in passes] for block in range(depth)]
    return [[round(share, 4) for share in row] for row in shares]


def _different(passes: list[dict[int, BlockMasks]]) -> int:
    """Sub-networks that differ in heads, groups or blocks."""
    seen = set()
    for masks in passes:
        decided = [m[:1] for block in masks.values() for m in (block.heads, block.groups, block.gate) if m is not None]
        seen.add(torch.cat([m.flatten() for m in decided]).bool().cpu().numpy().tobytes() if decided else b"")
    return len(seen)


def _token_maps(recording: _Recording, x: Tensor, labels: np.ndarray, model: LoadedModel) -> dict[str, Any]:
    """Per image and at some passes, in how many of all blocks (percent) the MLP saw each token; and the images themselves."""
    chosen = sorted({round(i) for i in np.linspace(0, len(recording.passes) - 1, _NUM_TIMES)})
    side = model.arch.input_size // model.arch.patch_size
    percent = []
    for i in chosen:
        tokens = torch.stack([masks.tokens for masks in recording.passes[i].values() if masks.tokens is not None])
        seen = tokens[:, : len(labels)].float().mean(0)  # the conditional half stands first
        percent.append((100 * seen).round().int().cpu().view(len(labels), side, side))
    return {
        "times": [round(recording.times[i], 6) for i in chosen],
        "percent": torch.stack(percent, dim=1).tolist(),
        "labels": labels.tolist(),
        "space": "latents" if model.of_latents else "pixels",
        "images": _shown(x, not model.of_latents).tolist(),
    }


def _shown(x: Tensor, pixels: bool) -> np.ndarray:
    """(B, S, S, 1 or 3) uint8: pixels as they are; of latents the first channels, each spread over its own range."""
    channels = _SHOWN_CHANNELS if x.shape[1] >= _SHOWN_CHANNELS else 1
    x = x[:, :channels].float()
    if not pixels:
        low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        x = 2 * (x - low) / (high - low).clamp(min=1e-6) - 1
    return to_uint8(x)
