"""Prompts and pixels as pipelines encode them: rows are what a drawing hands its transformer, latents what its decoder expects."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES
from torch import Tensor

from prompt_pipelines import LETTERS, clip_tokenizer, t5_tokenizer
from tinyfusion.data.prompts import padded
from tinyfusion.data.recorded import recording
from tinyfusion.jobs.text_encoding import RESULTS, PromptEncoder, encoding_arguments, results_of, takes_video
from tinyfusion.models.latent_space import LatentSpace, open_latent_space

Parts = Callable[[], dict[str, Any]]
_HEADS = dict(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3, intermediate_size=16, head_dim=8)


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def clip(width: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = dict(vocab_size=54, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPTextConfig(**sizes, projection_dim=width, bos_token_id=52, eos_token_id=53)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def words(template: bool = False) -> Any:
    """A tokenizer of letters, as decoders have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<pad>", "<unk>", "<bos>", "<eos>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(named)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        padding_side="right", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}" if template else None,
    )  # fmt: skip


def decoder(name: str, width: int) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=30, hidden_size=width, **_HEADS, pad_token_id=0)
    return getattr(transformers, f"{name}Model")(config).eval()


def vision_language(width: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = dict(vocab_size=30, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 intermediate_size=16, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]))  # fmt: skip
    sight = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=width)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=sight)).eval()


@dataclass(frozen=True)
class Family:
    """A pipeline with encoders in small. text, mask: arguments of its transformer. call: of a drawing, besides the prompt."""

    name: str
    parts: Parts
    text: str = "encoder_hidden_states"
    mask: str | None = None
    call: dict[str, Any] = field(default_factory=dict)


def one(encoder: Callable[[], Any], tokenizer: Callable[[], Any] = t5_tokenizer) -> Parts:
    return lambda: {"text_encoder": encoder(), "tokenizer": tokenizer()}


def three() -> dict[str, Any]:
    encoders = {"text_encoder": clip(12, True), "text_encoder_2": clip(12, True), "text_encoder_3": t5(32)}
    return encoders | {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}


def llama_and_clip() -> dict[str, Any]:
    return {
        "text_encoder": decoder("Llama", 16),
        "tokenizer": words(),
        "text_encoder_2": clip(8),
        "tokenizer_2": clip_tokenizer(),
    }


_CLIP = dict(num_frames=5)
FAMILIES = [
    Family("StableDiffusion3Pipeline", three),
    Family("AuraFlowPipeline", one(lambda: t5(32))),
    Family("PixArtSigmaPipeline", one(lambda: t5(16)), mask="encoder_attention_mask", call=dict(use_resolution_binning=False)),
    Family("LTXPipeline", one(lambda: t5(16)), mask="encoder_attention_mask", call=dict(num_frames=9)),
    Family("CogVideoXPipeline", one(lambda: t5(8)), call=_CLIP | dict(max_sequence_length=8)),
    Family("SanaPipeline", one(lambda: decoder("Gemma2", 8), words), mask="encoder_attention_mask",
           call=dict(use_resolution_binning=False)),
    Family("Lumina2Pipeline", one(lambda: decoder("Gemma2", 16), words), mask="encoder_attention_mask",
           call=dict(max_sequence_length=24, system_prompt="draw")),
    Family("ZImagePipeline", one(lambda: decoder("Qwen3", 16), lambda: words(template=True)), text="cap_feats"),
    Family("QwenImagePipeline", one(lambda: vision_language(16), words), mask="encoder_hidden_states_mask",
           call=dict(negative_prompt="", true_cfg_scale=4.0)),
    Family("HunyuanVideoPipeline", llama_and_clip, mask="encoder_attention_mask", call=_CLIP | dict(guidance_scale=6.0)),
    Family("WanPipeline", one(lambda: t5(16)), call=_CLIP),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers of diffusers
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rows_are_what_a_drawing_hands_its_transformer(family: Family) -> None:
    tiny = next(each for each in PIPELINES if each.name == family.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = family.parts()
    pipeline = tiny.build()
    pipeline.register_modules(**parts)
    pipeline.set_progress_bar_config(disable=True)
    kind = type(pipeline)
    arguments = encoding_arguments(kind, None)
    taken = set(inspect.signature(kind.encode_prompt).parameters) - {"negative_prompt"}
    arguments |= {name: value for name, value in family.call.items() if name in taken}
    encoder = PromptEncoder(pipeline, results_of(kind), arguments, torch.device("cpu"))
    rows, null = encoder.encode(["a cat", "the sea at night"]), encoder.null()
    table = {name: padded([rows[name], null[name]]) for name in rows}
    assert {len(tensor) for tensor in table.values()} == {3}
    seen = []
    with recording(pipeline.transformer) as calls, torch.no_grad():
        pipeline(prompt="a cat", height=64, width=64, num_inference_steps=1, output_type="latent", **family.call,
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
    for call in calls:
        texts, masks = call[family.text], call.get(family.mask or "")
        pooled = call.get("pooled_projections")
        for i in range(len(texts)):
            mask = torch.ones(len(texts[i])) if masks is None else masks[i]
            seen.append((texts[i], mask, None if pooled is None else pooled[i]))
    wanted = [0] if "Hunyuan" in family.name else [0, 2]  # its guidance is inside of the network
    for row in wanted:
        assert any(alike(table, row, *each) for each in seen), f"row {row}"
    assert len(seen) == len(wanted)
    assert not any(alike(table, 1, *each) for each in seen), "the rows differ by prompt"


def alike(table: dict[str, Tensor], row: int, text: Tensor, mask: Tensor, pooled: Tensor | None) -> bool:
    """Whether a row of a table is a text as a transformer gets it, at the tokens that count."""
    own = table["mask"][row].bool() if "mask" in table else torch.ones(table["embeddings"].shape[1], dtype=torch.bool)
    found, given = table["embeddings"][row][own], text[mask.bool()]
    if found.shape != given.shape or not torch.allclose(found, given, rtol=1e-4, atol=1e-5):
        return False
    return pooled is None or torch.allclose(table["pooled"][row], pooled, rtol=1e-4, atol=1e-5)


def test_the_table_of_results_is_that_of_this_diffusers() -> None:
    """Every class of the table returns as many values as the table says, by its source."""
    import ast
    import textwrap

    import diffusers

    for name, row in RESULTS.items():
        kind = getattr(diffusers, name)
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.encode_prompt)))
        returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
        nums = {len(value.elts) if isinstance(value, ast.Tuple) else 1 for value in returned}
        assert nums == {len(row)}, name
        encoding_arguments(kind, None)
    assert takes_video(diffusers.WanPipeline) and not takes_video(diffusers.QwenImagePipeline)


def test_arguments_are_those_of_a_drawing() -> None:
    import diffusers

    assert encoding_arguments(diffusers.WanPipeline, None)["max_sequence_length"] == 512  # 226 in encode_prompt
    assert encoding_arguments(diffusers.QwenImagePipeline, None)["max_sequence_length"] == 512  # 1024 in encode_prompt
    assert encoding_arguments(diffusers.WanPipeline, 64)["max_sequence_length"] == 64
    assert encoding_arguments(diffusers.Flux2Pipeline, None)["text_encoder_out_layers"] == (10, 20, 30)
    assert "crop_start" in encoding_arguments(diffusers.HunyuanVideoPipeline, None)["prompt_template"]
    sana = encoding_arguments(diffusers.SanaPipeline, None)
    assert len(sana["complex_human_instruction"]) > 3 and sana["clean_caption"] is False


# -------------------------------------------------------------------------------------------------------------- latents


_DOWN = dict(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
             norm_num_groups=2)  # fmt: skip
_MEANS = dict(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0])
_WAN = dict(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **_MEANS)
_DC = dict(latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_block_out_channels=(4, 4),
           decoder_block_out_channels=(4, 4), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
           downsample_block_type="conv", upsample_block_type="interpolate", encoder_qkv_multiscales=((), ()),
           decoder_qkv_multiscales=((), ()))  # fmt: skip
_LTX = dict(latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False, False, False), upsample_residual=(False, False), upsample_factor=(1, 1), patch_size=2,
            scaling_factor=0.7)  # fmt: skip
VAES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "scalar": ("AutoencoderKL", _DOWN | dict(scaling_factor=0.36, shift_factor=0.11), False),
    "channels": ("AutoencoderKL", _DOWN | _MEANS | dict(scaling_factor=0.5, latent_channels=4), False),
    "batch-norm": ("AutoencoderKLFlux2", _DOWN | dict(latent_channels=4), False),
    "exact": ("AutoencoderDC", _DC | dict(scaling_factor=0.4), False),
    "video-of-images": ("AutoencoderKLQwenImage", _WAN, False),
    "video": ("AutoencoderKLWan", _WAN, True),
    "buffers": ("AutoencoderKLLTXVideo", _LTX, True),
    "video-scalar": ("AutoencoderKLCogVideoX",
                     dict(block_out_channels=(4, 4), down_block_types=("CogVideoXDownBlock3D",) * 2, norm_num_groups=2,
                          up_block_types=("CogVideoXUpBlock3D",) * 2, latent_channels=4, layers_per_block=1,
                          temporal_compression_ratio=2, scaling_factor=1.15), True),
}  # fmt: skip


def saved_vae(folder: Path, kind: str) -> tuple[Any, LatentSpace]:
    import diffusers

    name, config, video = VAES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(diffusers, name)(**config).eval()
        for key, buffer in module.named_buffers():
            if key.endswith(("running_mean", "latents_mean")):
                buffer.copy_(torch.randn_like(buffer))
            elif key.endswith(("running_var", "latents_std")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    module.save_pretrained(folder / "vae")
    return module, open_latent_space(folder, str(folder), name, video)


def normalised(module: Any, z: Tensor, kind: str) -> Tensor:
    """Latents as the pipelines and examples of diffusers normalise them, written out per class."""
    config = module.config
    if kind == "batch-norm":
        num, channels, height, width = z.shape
        z = z.view(num, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        z = z.reshape(num, channels * 4, height // 2, width // 2)
        return (z - module.bn.running_mean.view(1, -1, 1, 1)) / torch.sqrt(
            module.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps
        )
    if kind == "buffers":
        mean, std = (getattr(module, name).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (z - mean) * config.scaling_factor / std
    if "latents_mean" in config and config.latents_mean is not None:
        shape = (1, -1, *[1] * (z.ndim - 2))
        mean, std = (torch.tensor(config[name]).view(shape) for name in ("latents_mean", "latents_std"))
        return (z - mean) / std * (config.get("scaling_factor") or 1.0)
    return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor


@pytest.mark.parametrize("kind", VAES)
def test_latents_are_normalised_as_pipelines_do(tmp_path: Path, kind: str) -> None:
    module, space = saved_vae(tmp_path, kind)
    frames = 5 if space.video else 1
    pixels = (
        torch.rand(2, 3, *([frames] if space.video else []), 64, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )
    with torch.no_grad():
        answer = module.encode(pixels if space.video or not space.deep else pixels.unsqueeze(2))
        wanted = answer.latent if space.exact else answer.latent_dist.mode()
        wanted = normalised(module, wanted, kind)
    wanted = wanted if space.video or not space.deep else wanted.squeeze(2)
    moments = space.moments(pixels)
    torch.testing.assert_close(space.latents(moments, None), wanted, rtol=1e-4, atol=1e-5)
    assert tuple(wanted.shape[1:]) == space.shape(64, 32, frames)
    if not space.exact:
        noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
        # a sample is the mean and the noise at the normalised deviation
        deviations = space.latents(moments, noise) - wanted, (space.latents(moments, 2 * noise) - wanted) / 2
        torch.testing.assert_close(*deviations, rtol=1e-3, atol=1e-4)
        if kind != "batch-norm":
            std = answer.latent_dist.std
            scaled = normalised(module, std, kind) - normalised(module, torch.zeros_like(std), kind)
            scaled = scaled if space.video or not space.deep else scaled.squeeze(2)
            torch.testing.assert_close(deviations[0], scaled * noise, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == type(module).__name__
