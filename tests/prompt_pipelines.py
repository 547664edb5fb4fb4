"""Whole pipelines in small, with text encoders and tokenizers of letters: they draw from prompts, from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def save_flux_pipeline(folder: Path, **sizes: Any) -> Path:
    """A FluxPipeline of 3 double and 4 single blocks, but for `sizes` of its transformer."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    small: dict[str, Any] = dict(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1, shift_factor=0.0),
            text_encoder=_clip(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=FluxTransformer2DModel(**small | sizes),
        ).save_pretrained(folder)
    return folder


def save_wan_pipeline(folder: Path) -> Path:
    """A WanPipeline of two experts with 4 blocks each."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    def expert() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
            freq_dim=32, ffn_dim=32, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(**_T5)),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=expert(),
            transformer_2=expert(),
            boundary_ratio=0.5,
        ).save_pretrained(folder)
    return folder


_T5: dict[str, Any] = dict(vocab_size=30, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_T5))


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(vocab_size=54, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=77, bos_token_id=52, eos_token_id=53))


def save_clip(folder: Path, seed: int = 2, words: int = 54, **changes: Any) -> Path:
    """A CLIP model for pictures of 32 pixels, with its tokenizer of letters. changes: of its configuration."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=words, max_position_embeddings=77, bos_token_id=52, eos_token_id=53)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config=sizes | text,
            vision_config=sizes | dict(image_size=32, patch_size=16),
            projection_dim=16,
            **changes,
        )
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A DINOv2 network for pictures of 224 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56, mlp_ratio=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
