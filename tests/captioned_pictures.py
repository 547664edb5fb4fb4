"""Pictures with captions beside them, a recipe for them, and what a small run of FLUX needs: as a reader would have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from prompt_pipelines import save_clip, save_dino, save_flux_pipeline

COLOURS = {"red": (220, 40, 30), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}
SIZES = ((40, 32), (32, 48), (36, 36))
LIGHT = """
description = "A lighter FLUX, of pictures of discs and squares."
teacher = "flux"

[data]
name = "photos"

[encode]
size = 16
max_tokens = 24
batch_size = 8

[prune]
scheme = "2:3;1:2"

[prune.training]
steps = 4
batch_size = 8
ema_decay = 0.3
log_every_steps = 1
checkpoint_every_steps = 2

[recover]
method = "logits-kd"

[recover.training]
steps = 4
batch_size = 8
ema_decay = 0.3
log_every_steps = 1
checkpoint_every_steps = 2

[pipeline]
num_steps = 2
max_tokens = 24
batch_size = 4
height = 16
width = 16

[evaluate]
features = "dinov2:dino"
clip = "clip"

[speed]
repeats = 1

[bench]
product_size = 64
"""


def save_pictures(folder: Path, num: int = 40) -> Path:
    """Discs and squares in four colours, of three sizes, each with a .txt of the same name."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(num):
        (height, width), name = SIZES[i % len(SIZES)], list(COLOURS)[i % len(COLOURS)]
        pixels = np.full((height, width, 3), generator.integers(180, 255, 3), dtype=np.uint8)
        y, x = np.mgrid[:height, :width] - np.array([height / 2, width / 2])[:, None, None] + generator.normal(0, 2)
        disc = bool(i // len(COLOURS) % 2)
        pixels[(x**2 + y**2 < 81) if disc else (abs(x) < 8) & (abs(y) < 8)] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        shape = "disc" if disc else "square"
        caption = f"a {name} {shape}" if i < num // 2 else f"{shape} in {name}"
        (folder / f"{i:02d}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return folder


def save_light_job(folder: Path, num: int = 40) -> Path:
    """A pipeline, pictures, a CLIP model, a DINOv2 network and the recipe `light.toml`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_flux_pipeline(folder / "flux")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    save_pictures(folder / "photos", num)
    (folder / "light.toml").write_text(LIGHT, encoding="utf-8")
    return folder
