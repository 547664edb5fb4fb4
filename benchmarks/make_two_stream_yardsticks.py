"""Make `digits-flux` and `digits-sd3`: pipelines of diffusers with small transformers of two streams, trained on digits with texts.

    python benchmarks/make_two_stream_yardsticks.py autoencoder --runs runs/two-stream
    python benchmarks/make_two_stream_yardsticks.py flux --runs runs/two-stream
    python benchmarks/make_two_stream_yardsticks.py sd3 --runs runs/two-stream

Run `autoencoder` first; the others may run at the same time. They encode the digits, train the transformer by the recipe
`digits-flux-teacher` or `digits-sd3-teacher`, and write the folder of the package (`--out` for another place). The same command
continues what was interrupted. Rounding depends on threads, processor and torch: expect the same quality from a repetition, not
the same weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from tinyfusion import cli
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rundir import atomic_write
from two_stream_parts import TOKENS, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, train_autoencoder

SHIPPED = Path(__file__).resolve().parents[1] / "src" / "tinyfusion" / "assets"
SD3_SHIFT = 1.5  # of noise levels, in training and drawing; FLUX shifts by the number of tokens when it draws
GUIDED = {"flux": 'true_cfg_scale=1.5, negative_prompt=""', "sd3": "guidance_scale=1.5"}


def untrained(kind: str, autoencoder: Path) -> Any:
    """The whole pipeline, its transformer of the class and sizes of the recipe with random weights."""
    import diffusers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

    model = load_recipe(f"digits-{kind}-teacher").model
    transformer = getattr(diffusers, str(model.family))(**(model.sizes or {}))
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
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SD3_SHIFT), vae=vae, transformer=transformer,
        text_encoder=clip_encoder(2, True), tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(3, True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(4), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def tinyfusion(*words: str | Path) -> None:
    """Run a command of the package; an error ends this program too."""
    if code := cli.main([str(word) for word in words]):
        raise SystemExit(code)


def make(kind: str, runs: Path, out: Path) -> None:
    """Write the pipeline to `out`; the work is in folders of `runs`."""
    recipe, place = f"digits-{kind}-teacher", runs / kind
    if not (begin := place / "untrained").exists():
        with atomic_write(begin) as temporary:
            untrained(kind, runs / "autoencoder").save_pretrained(temporary)
    tinyfusion("encode", "--recipe", recipe, "--data", "digits", "--pipeline", begin, "--out", place / "latents")
    data = f"latents:{place / 'latents'}"
    tinyfusion(
        "train", "--recipe", recipe, "--data", data, "--set", f"pipeline.folder={begin}", "--out", place / "trained"
    )
    export(kind, place / "trained", out)


def export(kind: str, run: Path, out: Path) -> None:
    """Write the pipeline of a trained run, with the card of the package in place of that of `export`."""
    pipeline = run.parent / "pipeline"
    tinyfusion("export", "--model", run, "--to", "diffusers", "--pipeline", "--overwrite", "--out", pipeline)
    with atomic_write(out) as temporary:
        shutil.copytree(pipeline, temporary, ignore=shutil.ignore_patterns("tinyfusion.json", ".*"), dirs_exist_ok=True)
        for file in temporary.glob("*/config.json"):  # without the place that it was opened from
            lines = [line for line in file.read_text().splitlines() if '"_name_or_path"' not in line]
            file.write_text("\n".join(lines) + "\n")
        (temporary / "README.md").write_text(card(kind, out))


def card(kind: str, folder: Path) -> str:
    """The README.md of the folder."""
    recipe = load_recipe(f"digits-{kind}-teacher")
    return f"""---
license: apache-2.0
library_name: diffusers
---

A small {recipe.model.family} ({recipe.train.made_images:,} training images) that draws scikit-learn's digits, 8 x 8 pixels, from texts
such as "a handwritten seven". Its text encoders are random and frozen; each word of the training texts is a token.

```python
pipe = DiffusionPipeline.from_pretrained(FOLDER)
pipe("a handwritten seven", height=8, width=8, max_sequence_length={TOKENS}, {GUIDED[kind]}).images[0]
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("autoencoder", "flux", "sd3"))
    parser.add_argument("--runs", type=Path, default=Path("runs/two-stream"), help="folder of the work")
    parser.add_argument("--out", type=Path, help="folder of the pipeline (default: where the package ships it)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    if options.what == "autoencoder":
        train_autoencoder(options.runs / "autoencoder")
    else:
        make(options.what, options.runs, options.out or SHIPPED / f"digits-{options.what}")


if __name__ == "__main__":
    main()
