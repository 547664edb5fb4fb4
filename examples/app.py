"""Draw with one or several models side by side, from the same noise, in a browser.

    python examples/app.py [--model digits runs/digits/recover] [--once]
Needs gradio (pip install 'tinyfusion[demo]'); --once draws two images with each model without it, and starts nothing.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from tinyfusion import SampleSection, open_model, sample_images
from tinyfusion.config.process_sections import FlowSampleSection
from tinyfusion.data.images import image_grid
from tinyfusion.models.autoencoder import open_autoencoder
from tinyfusion.sample.drive import to_uint8


def draw(model: Any, labels: list[int], steps: int, guidance: float, seed: int) -> tuple[np.ndarray, float]:
    """A row of images (H, W, 3) uint8, each of 64 pixels or more, and the milliseconds per image."""
    scale, began, even = guidance if model.null_class else 1.0, time.perf_counter(), FlowSampleSection(method="euler")
    ways = {"gaussian": {"sampler": "dpm-solver++", "num_steps": steps}, "masked": {"num_steps": min(steps, 8)}}
    given = ways.get(model.family.process, {"num_steps": steps + 1, "flow": even}) | {"guidance": scale}
    images = sample_images(model, labels, SampleSection(**({} if model.facts.few_steps else given)), seed=seed)
    if images.dtype != np.uint8:  # latents
        images = to_uint8(open_autoencoder(model.facts.vae).decode(torch.from_numpy(images).permute(0, 3, 1, 2)))
    per_image_ms, times = 1000 * (time.perf_counter() - began) / len(images), max(1, 64 // images.shape[1])
    large = images.repeat(times, 1).repeat(times, 2).repeat(3 // images.shape[3], 3)
    return image_grid(large, len(images)), per_image_ms


def app(models: dict[str, Any]) -> Any:
    """The page: classes, steps, guidance and seed, and a row of images of each model."""
    import gradio as gr

    def drawn(classes: str, steps: float, guidance: float, seed: float) -> list[Any]:
        how = [int(word) for word in classes.replace(",", " ").split()], int(steps), guidance, int(seed)
        rows = {name: draw(model, *how) for name, model in models.items()}
        return [gr.update(value=row, label=f"{name}: {ms:.0f} ms per image") for name, (row, ms) in rows.items()]

    classes, steps = gr.Textbox("0 1 2 3 4 5 6 7 8 9", label="classes"), gr.Slider(1, 100, 25, step=1, label="steps")
    asked = [classes, steps, gr.Slider(1, 8, 1.5, label="guidance"), gr.Number(0, label="seed", precision=0)]
    rows = [gr.Image(label=f"{name}: {len(model.stack)} blocks") for name, model in models.items()]
    return gr.Interface(drawn, asked, rows, title="The same noise, drawn by each model", flagging_mode="never")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["digits"], help="models, as every verb takes them")
    parser.add_argument("--once", action="store_true", help="draw two images with each model, and start nothing")
    args = parser.parse_args()
    opened = {name: open_model(name) for name in args.model}
    for name, model in opened.items():
        print(f"{name}: {len(model.stack)} blocks, {draw(model, [0, 1], 2, 1.5, 0)[1]:.0f} ms per image")
    if not args.once:
        app(opened).launch(show_error=True)  # the messages of tinyfusion say what to do
