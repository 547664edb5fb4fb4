"""Record of the units that a dynamic model runs along a trajectory: `kept.json`, for the charts of its page."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.blocks.dynamics import BlockMasks, Deciding, model_ratio, total_macs
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.process_specs import default_sampling, fits, sampler_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.macs import model_macs
from tinyfusion.sample.drive import SampleDraws, image_labels, to_uint8

KEPT = "kept.json"
_NUM_IMAGES = 4
_NUM_TIMES = 8  # of the token maps
_SHOWN_CHANNELS = 3


class _Recording(Deciding):
    """Decides as at inference, at full cost, and records the time and the masks of every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.passes: list[dict[int, BlockMasks]] = []

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """Begin a pass; `masks` is filled block by block."""
        super().begin(t, embedding)
        self.times.append(float(t[0]))
        self.passes.append(self.masks)


@torch.no_grad()
def dynamic_record(recipe: Recipe, model: LoadedModel) -> dict[str, Any]:
    """kept.json: heads, groups, tokens and blocks that ran at every time of the sampler, and which tokens of four images.

    The first four images of the recipe's sampling, with the published sampler where the recipe's does not fit the model, such
    as DDIM for a flow. Moves the model to the recipe's device.
    """
    routed = model.dynamic
    assert routed is not None
    sampling = recipe.sample if fits(recipe.sample, model) else default_sampling(model)
    sampler, device = sampler_of(sampling, model), device_for(recipe)
    model.module.to(device).eval()
    labels = image_labels(
        _NUM_IMAGES, len(model.conditions), recipe.seed, recipe.sample.labels, recipe.sample.label_rule == "balanced"
    )
    draws, recording = SampleDraws(Randomness(recipe.seed), 0, _NUM_IMAGES, device), _Recording()
    with routed.using(recording):
        condition = model.conditions.index(torch.from_numpy(labels)).to(device)
        x = deque(sampler.trajectory(model, condition, draws), maxlen=1).pop()
    sizes, settings, depth = routed.sizes, routed.settings, len(model.stack)
    ratios = []
    for masks in recording.passes:
        rows = next(len(m) for m in (masks[0].heads, masks[0].tokens, masks[0].gate) if m is not None)
        ratios.append(model_ratio(masks, sizes, rows).mean())
    ratio, static = float(torch.stack(ratios).mean()), model_macs(model)
    first = {time: i for i, time in reversed(list(enumerate(recording.times)))}  # its first pass, of every time
    times = list(dict.fromkeys(recording.times))
    passes = [recording.passes[first[time]] for time in times]
    shares = {
        name: _shares(passes, name, depth)
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
        "sub_networks": _different(passes),
        "ratio": ratio,
        "macs": total_macs(static, sizes, depth, ratio, settings.tokens),
        "static_macs": static,
        "maps": _token_maps(recording, x, labels, model) if settings.tokens else None,
    }


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
    """Per image and at some passes, the percentage of blocks whose MLP processed each token; and the images."""
    chosen = sorted({round(i) for i in np.linspace(0, len(recording.passes) - 1, _NUM_TIMES)})
    side = model.arch.input_size // model.arch.patch_size
    percent = []
    for i in chosen:
        tokens = torch.stack([masks.tokens for masks in recording.passes[i].values() if masks.tokens is not None])
        seen = tokens[:, : len(labels)].float().mean(0)  # the conditional half comes first
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
