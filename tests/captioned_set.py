"""A set of latents with encoded texts for a tiny pipeline, without encoding anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tinyfusion.data.latents import LatentSpec, encoded_values, unfinished_shard, write_manifest


def save_set(
    folder: Path, channels: int = 4, width: int = 32, images: int = 16, texts: int = 4, frames: int | None = None,
    masked: bool = False, **more: int,
) -> Path:  # fmt: skip
    """Random latents (channels, 8, 8), of videos (channels, frames, 8, 8), and texts of up to 6 tokens.

    width: of the embeddings; more: of further tensors, such as pooled ones. masked: texts of unequal length, with masks.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shape = (channels, 8, 8) if frames is None else (channels, frames, 8, 8)
    spec = LatentSpec(images, images, "samples", "float32", 1, shape, texts, 1.0, 0.0)
    with unfinished_shard(folder, spec, 0, np.arange(images) % texts, 0) as append:
        append(encoded_values(torch.randn(images, 1, *shape, generator=generator), "float32"))
    write_manifest(folder, spec, {})
    table = {"embeddings": torch.randn(texts + 1, 6, width, generator=generator)}
    table |= {name: torch.randn(texts + 1, size, generator=generator) for name, size in more.items()}
    if masked:
        lengths = torch.arange(texts + 1) % 3 + 4
        table["mask"] = (torch.arange(6) < lengths[:, None]).to(torch.uint8)
    save_file(table, folder / "prompts.safetensors")
    return folder
