"""One row per family: sizes of a tiny model, on which the laws that hold for all families are checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.processes.base import Batch

_SIZES = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=4, num_heads=2, num_classes=5)
# name -> sizes of the recipe's section `model`
ROWS: dict[str, dict[str, Any]] = {
    "dit": _SIZES,
    "sit": _SIZES,
    "mar": {**_SIZES, "buffer_size": 3, "head_depth": 2, "head_width": 8},
    "pixart": {**_SIZES, "caption_tokens": 3, "caption_channels": 8},
}


def tiny(family: str, seed: int = 0, std: float = 0.2) -> LoadedModel:
    """A model whose every weight is random, so that every block and branch matters."""
    model = new_model(family, ROWS[family], seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std, generator=generator)
    return dataclasses.replace(model, module=model.module.eval())


def clean_batch(model: LoadedModel, num: int, seed: int = 0) -> Batch:
    """Random images and conditions that fit the model."""
    arch, draws = model.arch, Randomness(seed).at(0, 0, num)
    x = torch.from_numpy(draws.normal("x", (arch.in_channels, arch.input_size, arch.input_size)))
    table = model.conditions
    return Batch(x, table.index(torch.from_numpy(draws.integers("y", len(table)))))
