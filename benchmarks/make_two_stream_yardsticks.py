"""Make `digits-flux` and `digits-sd3`: pipelines of diffusers with small transformers of two streams, trained on digits with texts.

    python benchmarks/make_two_stream_yardsticks.py autoencoder --runs runs/two-stream
    python benchmarks/make_two_stream_yardsticks.py flux --runs runs/two-stream
    python benchmarks/make_two_stream_yardsticks.py sd3 --runs runs/two-stream

Run `autoencoder` first; the others may run at the same time. Interrupted trainings continue at their last checkpoint. The folders
of the package are written at the end of each (`--out` for another place). Rounding depends on threads, processor and torch: expect
the same quality from a repetition, not the same weights.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.conditioning.condition import Condition
from tinyfusion.conditioning.texts import text_table
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import atomic_write
from tinyfusion.data.batches import jitter
from tinyfusion.data.captioned_digits import DIGIT_PROMPTS, PHRASINGS
from tinyfusion.data.digits import load_digits
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.families.diffusers_classes.calls import CallContext, called
from tinyfusion.processes.time import shifted
from two_stream_parts import (
    TEXT_WIDTH,
    TOKENS,
    clip_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    train_autoencoder,
)

SHIPPED = Path(__file__).resolve().parents[1] / "src" / "tinyfusion" / "assets"
WIDTH, HEAD = 48, 16
COPIES = 24  # of every digit, half of them turned, scaled and sheared a little
BATCH, RATE, WARMUP, DECAY, AVERAGE = 64, 2e-3, 100, 1000, 0.999
STEPS = {"flux": 4000, "sd3": 4000}
SHIFT = {"flux": 1.0, "sd3": 1.5}  # in training; FLUX shifts by the number of tokens when it draws
DROP = 0.1  # of prompts
DROP_FROM = {"flux": 500, "sd3": 0}  # step


def new_transformer(kind: str) -> Any:
    """The transformer with initial weights: modulations and the output zero, as in DiT, other layers Xavier."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    sizes = dict(attention_head_dim=HEAD, num_attention_heads=WIDTH // HEAD)
    texts = dict(joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH)
    torch.manual_seed(0)
    model: Any
    if kind == "flux":
        model = FluxTransformer2DModel(
            **sizes, **texts, patch_size=1, in_channels=4, num_layers=4, num_single_layers=8, guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    else:
        model = SD3Transformer2DModel(
            **sizes, **texts, sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=12,
            caption_projection_dim=WIDTH, pos_embed_max_size=8, qk_norm="rms_norm",
        )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    modulations = ("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear")
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out") or any(part in name for part in modulations):
            nn.init.zeros_(parameter)
        elif "timestep_embedder.linear" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
    return model


def pipeline(kind: str, autoencoder: Path, transformer: Any) -> Any:
    """The whole pipeline."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

    vae = AutoencoderKL.from_pretrained(autoencoder)
    if kind == "flux":
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
            ),
            vae=vae, text_encoder=clip_encoder(1, False), tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(4),
            tokenizer_2=t5_tokenizer(), transformer=transformer,
        )  # fmt: skip
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT["sd3"]), vae=vae, transformer=transformer,
        text_encoder=clip_encoder(2, True), tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(3, True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(4), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


@torch.no_grad()
def encoded_texts(kind: str, parts: Any) -> Condition:
    """The table of the prompts, by the pipeline's own encoders; its null row is the empty prompt."""
    texts = [*DIGIT_PROMPTS, ""]
    if kind == "flux":
        embeddings, pooled, _ids = parts.encode_prompt(texts, max_sequence_length=TOKENS)
    else:
        embeddings, _null, pooled, _null_pooled = parts.encode_prompt(texts, None, None, max_sequence_length=TOKENS)
    return text_table({"embeddings": embeddings, "pooled": pooled})


@torch.no_grad()
def encoded_images(autoencoder: Any, x: Tensor) -> Tensor:
    """Latents (N, 1, 8, 8) as the transformer sees them, of grey images in [-1, 1]."""
    modes = [autoencoder.encode(part.expand(-1, 3, -1, -1)).latent_dist.mode() for part in x.split(512)]
    latents: Tensor = (torch.cat(modes) - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return latents


@dataclass
class Teacher:
    """A training. latents (N, 1, 8, 8) and labels (N,) of the training images; `texts` has the conditions of the labels."""

    kind: str
    model: Any
    texts: Condition
    latents: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        config = {"_class_name": type(self.model).__name__, **self.model.config}
        self.call = call_of(config)
        self.predict = called(self.call, CallContext(config))

    def loss(self, model: Any, x: Tensor, condition: Condition, sigma: Tensor, noise: Tensor) -> Tensor:
        """(B,) squared error of the velocity at noise levels sigma (B,)."""
        level = sigma.view(-1, 1, 1, 1)
        output = self.predict(model, (1 - level) * x + level * noise, self.call.convention.at_sigma(sigma), condition)
        return (output - (noise - x)).square().mean((1, 2, 3))

    def step(self, step: int) -> Tensor:
        """The mean loss of a batch, addressed by the step."""
        draws = Randomness(0).at(step, 0, BATCH)
        rows = torch.from_numpy((draws.uniform("rows") * len(self.latents)).astype(np.int64))
        condition = self.texts.index(self.labels[rows])
        if step >= DROP_FROM[self.kind]:
            dropped = torch.from_numpy(draws.uniform("drop") < DROP)
            condition = condition.each_with_null(
                lambda tensor, null: torch.where(dropped.view(-1, *[1] * (tensor.ndim - 1)), null, tensor)
            )
        sigma = shifted(torch.from_numpy(draws.uniform("time")).float(), SHIFT[self.kind])
        noise = torch.from_numpy(draws.normal("noise", tuple(self.latents.shape[1:]))).float()
        return self.loss(self.model, self.latents[rows], condition, sigma, noise).mean()


def teacher(kind: str, parts: Any) -> Teacher:
    """The training of a pipeline's transformer."""
    images, x, labels = load_digits(), [], []
    for copy in range(COPIES):
        moved = jitter(torch.from_numpy(images.x), Randomness(0).at(copy, 0, len(images)), 0.5)
        x.append(encoded_images(parts.vae, moved))
        labels.append(torch.from_numpy(images.y) * len(PHRASINGS) + copy % len(PHRASINGS))
    return Teacher(kind, parts.transformer, encoded_texts(kind, parts), torch.cat(x), torch.cat(labels))


def rate_at(step: int, steps: int) -> float:
    """The learning rate: a warm-up, then constant, and a linear decay to a hundredth at the end."""
    return RATE * min(1, (step + 1) / WARMUP) * max(0.01, min(1.0, (steps - step) / DECAY))


def train(work: Teacher, folder: Path, steps: int) -> None:
    """Train in place, with a checkpoint every 250 steps; the model has the averaged weights at the end."""
    model, file = work.model, folder / "state.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    first = 0
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    for block in [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]:
        block.compile()
    total = 0.0
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, steps)
        loss = work.step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = 1 - min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            weights = model.state_dict()
            torch._foreach_lerp_([*average.values()], [weights[name] for name in average], share)
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {total / 100:.4f}", flush=True)
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
            }
            torch.save(state, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
    model.load_state_dict({**model.state_dict(), **average})


def without_paths(folder: Path) -> None:
    """Take the places that components were opened from out of their configs."""
    for file in folder.glob("*/config.json"):
        lines = [line for line in file.read_text().splitlines() if '"_name_or_path"' not in line]
        file.write_text("\n".join(lines) + "\n")


def card(kind: str, parts: Any) -> str:
    """The README.md of the folder."""
    size = sum(parameter.numel() for parameter in parts.transformer.parameters())
    guidance = ', true_cfg_scale=1.5, negative_prompt=""' if kind == "flux" else ", guidance_scale=1.5"
    return f"""---
license: apache-2.0
library_name: diffusers
---

A small {type(parts.transformer).__name__} ({size:,} parameters, {STEPS[kind] * BATCH:,} training images) that draws scikit-learn's digits,
8 x 8 pixels, from texts such as "a handwritten seven". Its text encoders are random and frozen; each word of the training texts is a token.

```python
pipe = DiffusionPipeline.from_pretrained(FOLDER)
pipe("a handwritten seven", height=8, width=8, max_sequence_length={TOKENS}{guidance}).images[0]
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("autoencoder", "flux", "sd3"))
    parser.add_argument("--runs", type=Path, default=Path("runs/two-stream"), help="folder of checkpoints")
    parser.add_argument("--out", type=Path, help="folder of the pipeline (default: where the package ships it)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    autoencoder = options.runs / "autoencoder"
    if options.what == "autoencoder":
        train_autoencoder(autoencoder)
        return
    parts = pipeline(options.what, autoencoder, new_transformer(options.what))
    train(teacher(options.what, parts), options.runs / options.what, STEPS[options.what])
    with atomic_write(options.out or SHIPPED / f"digits-{options.what}") as temporary:
        parts.save_pretrained(temporary)
        without_paths(temporary)
        (temporary / "README.md").write_text(card(options.what, parts))


if __name__ == "__main__":
    main()
