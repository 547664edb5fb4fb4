"""A set of latents with encoded texts for a tiny pipeline, without encoding anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tinyfusion.data.latents import LatentSpec, encoded_values, unfinished_shard, write_manifest


def save_set(folder: Path, channels: int = 4, width: int = 32, images: int = 16, texts: int = 4, **more: int) -> Path:
    """Random latents (channels, 8, 8), and texts of 6 tokens with embeddings of `width` and pooled ones of `pooled`."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    spec = LatentSpec(images, images, "samples", "float32", 1, (channels, 8, 8), texts, 1.0, 0.0)
    with unfinished_shard(folder, spec, 0, np.arange(images) % texts, 0) as append:
        append(encoded_values(torch.randn(images, 1, channels, 8, 8, generator=generator), "float32"))
    write_manifest(folder, spec, {})
    table = {"embeddings": torch.randn(texts + 1, 6, width, generator=generator)}
    table |= {name: torch.randn(texts + 1, size, generator=generator) for name, size in more.items()}
    save_file(table, folder / "prompts.safetensors")
    return folder
