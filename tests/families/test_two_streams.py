"""The shipped yardsticks of two streams: plain diffusers opens them, words differ, latents lose nothing, and they draw what is asked."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tinyfusion import cli
from tinyfusion.data.captioned_digits import DIGIT_PROMPTS, DIGIT_WORDS, captioned, digit_of
from tinyfusion.data.digits import load_digits
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.models.places import shipped_models
from tinyfusion.sample.drive import to_uint8

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about themselves
NAMES = ("digits-flux", "digits-sd3")
GUIDED = {"digits-flux": {"true_cfg_scale": 1.5, "negative_prompt": ""}, "digits-sd3": {"guidance_scale": 1.5}}


@pytest.fixture(scope="module", params=NAMES)
def pipeline(request: pytest.FixtureRequest) -> Any:
    from diffusers import DiffusionPipeline

    opened: Any = DiffusionPipeline.from_pretrained(shipped_models()[request.param], local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    opened.shipped_as = request.param
    return opened


def test_no_tensor_is_missing(pipeline: Any) -> None:
    folder = shipped_models()[pipeline.shipped_as]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6 * 2**20
    for name in ("transformer", "vae"):
        kind = type(getattr(pipeline, name))
        _, report = kind.from_pretrained(folder / name, output_loading_info=True, local_files_only=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


def test_words_are_tokens_that_differ(pipeline: Any) -> None:
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer"):
            lengths = [len(ids) for ids in tokenizer(list(DIGIT_PROMPTS)).input_ids]
            assert max(lengths) <= tokenizer.model_max_length
            assert len(set(map(tuple, tokenizer(list(DIGIT_PROMPTS)).input_ids))) == len(DIGIT_PROMPTS)
    with torch.no_grad():
        embeddings, *others = pipeline.encode_prompt(list(DIGIT_WORDS), *_unset(pipeline), max_sequence_length=6)
    pooled = others[0] if pipeline.shipped_as == "digits-flux" else others[1]
    for encoded in (embeddings.flatten(1), pooled):
        distances = [float((encoded[i] - encoded[j]).norm() / encoded[i].norm()) for i, j in combinations(range(10), 2)]
        assert min(distances) > 0.1


def _unset(pipeline: Any) -> list[None]:
    """Positional second and third prompts."""
    return [None] if pipeline.shipped_as == "digits-flux" else [None, None]


def test_latents_lose_nothing(pipeline: Any) -> None:
    x = torch.from_numpy(load_digits(heldout=True).x)
    with torch.no_grad():
        z = pipeline.vae.encode(x.expand(-1, 3, -1, -1)).latent_dist.mode()
        pixels = pipeline.vae.decode(z).sample
    assert (pixels - x).square().mean().sqrt() * 8 < 0.2  # grey levels, of 16
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    seen = (z - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert abs(float(seen.mean())) < 0.1 and abs(float(seen.std()) - 1) < 0.1


def test_draws_what_is_asked(pipeline: Any) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(len(DIGIT_PROMPTS))]
    images = pipeline(
        list(DIGIT_PROMPTS), height=8, width=8, num_inference_steps=8, generator=generators, max_sequence_length=6,
        output_type="np", **GUIDED[pipeline.shipped_as],
    ).images  # fmt: skip
    features = open_extractor("digits-classifier", "cpu")((images[..., :1] * 255).round().astype(np.uint8))
    assert features.logits is not None
    right = features.logits.argmax(1) == [digit_of(prompt) for prompt in DIGIT_PROMPTS]
    assert right.mean() > 0.85


def test_captions_of_digits() -> None:
    images = load_digits(heldout=True)
    thrice = captioned(images, 3)
    assert [digit_of(DIGIT_PROMPTS[label]) for label in thrice.y] == [*images.y] * 3
    assert len({*thrice.y}) == len(DIGIT_PROMPTS) == len({*DIGIT_PROMPTS})
    assert not (thrice.y[:360] == thrice.y[360:720]).any()
    assert digit_of("a seven and an eight") is None and digit_of("a picture") is None
    assert to_uint8(torch.from_numpy(thrice.x)).shape == (1080, 8, 8, 1)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a transformer."""
    return {n: tuple(t.shape) for n, t in load_file(folder / "diffusion_pytorch_model.safetensors").items()}


def config(folder: Path) -> dict[str, Any]:
    """The config.json of a transformer, without what diffusers notes of itself."""
    values = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in values.items() if name[0] != "_"}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_of_the_teacher(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the recipe make the transformer that ships, which takes its place in the pipeline that the recipe names."""
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> None:
        assert cli.main(line.split()) == 0, line

    shipped = shipped_models()[name]
    command(f"encode --recipe {name}-teacher --data digits --out latents")
    short = "--steps 2 --set train.warmup_steps=0 --set train.ema_decay=0.5 --set compute.compile=false"
    command(f"train --recipe {name}-teacher --data latents:latents {short} --out trained")
    trained = tmp_path / "trained" / "model"
    known = config(shipped / "transformer")
    assert {field: value for field, value in config(trained).items() if field in known} == known
    assert stored_shapes(trained) == stored_shapes(shipped / "transformer")
    command("export --model trained --to diffusers --pipeline --out pipeline")
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "pipeline" / weights).read_bytes() == (shipped / weights).read_bytes()
    Path("prompts.txt").write_text("a handwritten seven\nthree\n")
    size = "--set pipeline.height=8 --set pipeline.width=8 --set pipeline.num_steps=2"
    for model in ("trained", "pipeline"):
        command(f"sample --model {model} --prompts prompts.txt {size} --out {model}.npz")
    drawn = [np.load(f"{model}.npz")["arr_0"] for model in ("trained", "pipeline")]
    assert len(drawn[0]) == 2 and (drawn[0] == drawn[1]).all()
