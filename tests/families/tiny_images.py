# ruff: noqa: E501
"""Classes of images in small."""

from __future__ import annotations

from typing import Any

import torch
from tiny import SINGLE, TRUNK, Tiny, draw, grid, levels, line, mask, steps
from torch import Tensor

_FLUX = dict(patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=32, axes_dims_rope=[4, 4, 8])  # fmt: skip
_TWO = {TRUNK: [0], SINGLE: [1, 3]}


def _packed(num: int, text: int = 32, **more: Any) -> dict[str, Any]:
    """16 image and 10 text tokens, so that no axis is mistaken for another."""
    return dict(hidden_states=draw(num, 16, 4), encoder_hidden_states=draw(num, 10, text), img_ids=draw(16, 3),
                txt_ids=draw(10, 3), timestep=levels(num)) | more  # fmt: skip


def _four_ids(num: int, **more: Any) -> dict[str, Any]:
    return _packed(num, img_ids=grid(4, 4), txt_ids=line(10)) | more


def _latents(num: int, text: int, tokens: int = 10, **more: Any) -> dict[str, Any]:
    return (
        dict(hidden_states=draw(num, 4, 8, 8), encoder_hidden_states=draw(num, tokens, text), timestep=steps(num))
        | more
    )


def _sd3(num: int) -> dict[str, Any]:
    return _latents(num, 32, pooled_projections=draw(num, 24))


_SD3 = dict(sample_size=8, patch_size=1, in_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=16)  # fmt: skip
_QWEN = dict(patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=16, axes_dims_rope=(8, 4, 4))  # fmt: skip
_JOY = dict(patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=4,
            rope_dim_list=[4, 6, 6], theta=256)  # fmt: skip


def _ideogram(num: int) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    image, text = torch.zeros(num, 9, 16), torch.zeros(num, 9, 24)
    image[:, 5:], text[:, :5] = draw(num, 4, 16), draw(num, 5, 24)
    position = torch.arange(9)[None, :, None].repeat(num, 1, 3)
    position[:, 5:] += IMAGE_POSITION_OFFSET
    indicator = torch.full((num, 9), LLM_TOKEN_INDICATOR)
    indicator[:, 5:] = OUTPUT_IMAGE_INDICATOR
    return dict(hidden_states=image, encoder_hidden_states=text, timestep=levels(num, 0.5), position_ids=position,
                segment_ids=torch.ones(num, 9, dtype=torch.int64), indicator=indicator)  # fmt: skip


def _without(name: str, entries: set[int]) -> Any:
    """The inputs of a student whose caller gives one entry less per removed block."""

    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        value = inputs[name]
        if isinstance(value, Tensor):
            return {**inputs, name: value[:, [i for i in range(value.shape[1]) if i not in entries]]}
        return {**inputs, name: [each for i, each in enumerate(value) if i not in entries]}

    return change


IMAGES = [
    Tiny("FluxTransformer2DModel", _FLUX | dict(pooled_projection_dim=32, guidance_embeds=True),
         lambda n: _packed(n, pooled_projections=draw(n, 32), guidance=levels(n, 3.5)), _TWO),
    Tiny("OvisImageTransformer2DModel", _FLUX | dict(out_channels=4), _packed, _TWO),
    Tiny("LongCatImageTransformer2DModel", _FLUX | dict(pooled_projection_dim=32), _packed, _TWO),
    Tiny("BriaTransformer2DModel", _FLUX | dict(pooled_projection_dim=None), _packed, _TWO),
    Tiny("BriaFiboTransformer2DModel", _FLUX | dict(pooled_projection_dim=None, joint_attention_dim=64, text_encoder_dim=16),
         lambda n: _packed(n, 64, text_encoder_layers=list(draw(7, n, 10, 16))), _TWO,
         for_student=_without("text_encoder_layers", {0, 4, 6})),
    Tiny("ChromaTransformer2DModel", _FLUX | dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=2),
         _packed, _TWO),
    Tiny("Flux2Transformer2DModel", _FLUX | dict(timestep_guidance_channels=16, axes_dims_rope=[4, 4, 4, 4]),
         lambda n: _four_ids(n, img_ids=grid(4, 4).expand(n, -1, -1), txt_ids=line(10).expand(n, -1, -1), guidance=levels(n, 4.0)), _TWO),
    Tiny("Flux3Transformer2DModel",
         dict(in_channels=4, cond_in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
              joint_attention_dim=32, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
         lambda n: _four_ids(n, image_cond_hidden_states=draw(n, 9, 4), image_cond_ids=grid(3, 3)),
         {"txt_mode_blocks": [0], "mode_blocks.image": [1], "mode_blocks.image_cond": [2], SINGLE: [1, 3]}),
    Tiny("SD3Transformer2DModel", _SD3 | dict(dual_attention_layers=(), qk_norm=None), _sd3, {TRUNK: [1, 4]}),
    Tiny("SD3Transformer2DModel", _SD3 | dict(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"), _sd3, {TRUNK: [1, 3]}, tag="3.5-medium"),
    Tiny("AuraFlowTransformer2DModel",
         dict(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=3, num_single_dit_layers=3, attention_head_dim=8,
              num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4, pos_embed_max_size=64),
         lambda n: _latents(n, 32, timestep=levels(n)), {"joint_transformer_blocks": [1], SINGLE: [0]}),
    Tiny("QwenImageTransformer2DModel", _QWEN,
         lambda n: dict(hidden_states=draw(n, 16, 16), encoder_hidden_states=draw(n, 9, 16), timestep=levels(n),
                        encoder_hidden_states_mask=mask(n, 9), img_shapes=[[(1, 4, 4)]] * n), {TRUNK: [0, 3]}),
    Tiny("QwenImage21Transformer2DModel",
         dict(patch_size=1, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
              mlp_ratio=2, axes_dims_rope=(8, 4, 4)),
         lambda n: dict(hidden_states=draw(n, 16, 8), encoder_hidden_states=draw(n, 9, 16), timestep=levels(1), img_shapes=[[(1, 4, 4)]] * n,
                        img_mask=torch.tensor([[False] * 9 + [True] * 4]).expand(n, -1)), {TRUNK: [1, 3]}),
    Tiny("NucleusMoEImageTransformer2DModel",
         _QWEN | dict(num_layers=6, num_attention_heads=4, moe_enabled=True, num_experts=4, moe_intermediate_dim=16,
                      capacity_factors=[2.0, 2.0, 2.0, 2.0, 1.0, 1.0]),
         lambda n: dict(hidden_states=draw(n, 16, 16), encoder_hidden_states=draw(n, 9, 16), timestep=levels(n),
                        encoder_hidden_states_mask=torch.ones(n, 9, dtype=torch.long), img_shapes=[(1, 4, 4)] * n), {TRUNK: [3]}),
    Tiny("ZImageTransformer2DModel",
         dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16, n_layers=4, n_refiner_layers=3, n_heads=1, n_kv_heads=1,
              cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
         lambda n: dict(x=list(draw(n, 4, 1, 8, 8)), cap_feats=list(draw(n, 20, 16)), t=levels(n)),
         {"noise_refiner": [0], "context_refiner": [2], "layers": [1, 3]}),
    Tiny("Lumina2Transformer2DModel",
         dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=3, num_attention_heads=3,
              num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=16),
         lambda n: _latents(n, 16, timestep=levels(n), encoder_attention_mask=mask(n, 10)),
         {"noise_refiner": [0], "context_refiner": [2], "layers": [0, 2]}),
    Tiny("LuminaNextDiT2DModel",
         dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
              learn_sigma=False, cross_attention_dim=16),
         lambda n: _latents(n, 16, timestep=levels(n), encoder_mask=torch.ones(n, 10), cross_attention_kwargs={},
                            image_rotary_emb=torch.polar(torch.ones(384, 384, 4), draw(384, 384, 4))), {"layers": [1, 3]}),
    Tiny("ErnieImageTransformer2DModel",
         dict(hidden_size=16, num_attention_heads=1, num_layers=4, ffn_hidden_size=16, in_channels=16, out_channels=16, patch_size=1,
              text_in_dim=16, rope_axes_dim=(8, 4, 4)),
         lambda n: dict(hidden_states=draw(n, 16, 4, 4), timestep=levels(n, 500.0), text_bth=draw(n, 10, 16), text_lens=torch.full((n,), 10)),
         {"layers": [0, 2]}),
    Tiny("HiDreamImageTransformer2DModel",
         dict(patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=8, num_attention_heads=4,
              caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
              max_resolution=(16, 16), llama_layers=(0, 1, 2, 1, 0, 2), force_inference_output=True),
         lambda n: dict(hidden_states=draw(n, 4, 16, 16), encoder_hidden_states_t5=draw(n, 8, 8),
                        encoder_hidden_states_llama3=draw(3, n, 8, 4), pooled_embeds=draw(n, 8), timesteps=steps(n)),
         {"double_stream_blocks": [1], "single_stream_blocks": [0]}),
    Tiny("SanaTransformer2DModel",
         dict(patch_size=1, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=4, num_attention_heads=2,
              num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8),
         lambda n: _latents(n, 8), {TRUNK: [0, 3]}),
    Tiny("PixArtTransformer2DModel",
         dict(sample_size=8, num_layers=4, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=4, cross_attention_dim=8,
              out_channels=8, norm_eps=1e-6, use_additional_conditions=False, caption_channels=16),
         lambda n: _latents(n, 16, added_cond_kwargs=dict(resolution=None, aspect_ratio=None)), {TRUNK: [0, 2]}),
    Tiny("DiTTransformer2DModel",
         dict(in_channels=4, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=4, num_embeds_ada_norm=8, patch_size=2,
              sample_size=8),
         lambda n: dict(hidden_states=draw(n, 4, 8, 8), timestep=steps(n), class_labels=torch.arange(n)), {TRUNK: [1, 3]}),
    Tiny("HunyuanDiT2DModel",
         dict(sample_size=8, patch_size=2, in_channels=4, num_layers=8, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=8,
              cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=4, text_len_t5=4),
         lambda n: _latents(n, 8, 4, text_embedding_mask=torch.ones(n, 4), encoder_hidden_states_t5=draw(n, 4, 8),
                            text_embedding_mask_t5=torch.ones(n, 4), image_meta_size=torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * n),
                            style=torch.zeros(n, dtype=torch.int64), image_rotary_emb=(draw(16, 8), draw(16, 8)))
         | dict(timestep=steps(n).float()), {"blocks": [0, 2, 5, 7]}),
    Tiny("CogView3PlusTransformer2DModel",
         dict(patch_size=2, in_channels=4, num_layers=4, attention_head_dim=4, num_attention_heads=2, out_channels=4, text_embed_dim=8,
              time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8),
         lambda n: _latents(n, 8, original_size=torch.full((n, 2), 64), target_size=torch.full((n, 2), 64),
                            crop_coords=torch.zeros(n, 2, dtype=torch.int64)), {TRUNK: [0, 3]}),
    Tiny("CogView4Transformer2DModel",
         dict(patch_size=2, in_channels=4, num_layers=4, attention_head_dim=4, num_attention_heads=4, out_channels=4, text_embed_dim=8,
              time_embed_dim=8, condition_dim=4),
         lambda n: _latents(n, 8, original_size=torch.full((n, 2), 64), target_size=torch.full((n, 2), 64),
                            crop_coords=torch.zeros(n, 2, dtype=torch.int64)), {TRUNK: [1, 3]}),
    Tiny("GlmImageTransformer2DModel",
         dict(patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
              time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=32),
         lambda n: _latents(n, 16, prior_token_id=torch.arange(16).repeat(n, 1), prior_token_drop=torch.zeros(n, 16, dtype=torch.bool),
                            target_size=torch.full((n, 2), 8.0), crop_coords=torch.zeros(n, 2)), {TRUNK: [0, 3]}),
    Tiny("Krea2Transformer2DModel",
         dict(in_channels=8, num_layers=4, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
              timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
              text_intermediate_size=16, num_layerwise_text_blocks=3, num_refiner_text_blocks=3, axes_dims_rope=(4, 2, 2)),
         lambda n: dict(hidden_states=draw(n, 16, 8), encoder_hidden_states=draw(n, 6, 3, 16), timestep=levels(n), position_ids=draw(22, 3),
                        encoder_attention_mask=mask(n, 6)),
         {TRUNK: [0, 3], "text_fusion.layerwise_blocks": [1], "text_fusion.refiner_blocks": [0]}),
    Tiny("Ideogram4Transformer2DModel",
         dict(in_channels=16, num_layers=4, attention_head_dim=8, num_attention_heads=4, intermediate_size=32, adaln_dim=16,
              llm_features_dim=24, rope_theta=10000, mrope_section=(2, 1, 1)), _ideogram, {"layers": [0, 3]}),
    Tiny("PRXTransformer2DModel",
         dict(in_channels=4, patch_size=2, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=4, axes_dim=[8, 8]),
         lambda n: _latents(n, 16, timestep=levels(n)), {"blocks": [1, 3]}),
    Tiny("OmniGenTransformer2DModel",
         dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=4, pad_token_id=0, vocab_size=100,
              in_channels=4, time_step_dim=4, rope_scaling=dict(long_factor=[1, 2], short_factor=[1, 2])),
         lambda n: dict(hidden_states=draw(n, 4, 8, 8), timestep=levels(n), input_ids=torch.arange(6).repeat(n, 1), input_img_latents=[],
                        input_image_sizes={}, attention_mask=torch.ones(n, 23, 23), position_ids=torch.arange(23).repeat(n, 1)),
         {"layers": [0, 2]}),
    Tiny("BriaFibo2Transformer2DModel",
         dict(in_channels=4, patch_size=2, dim=16, n_layers=5, n_refiner_layers=3, n_heads=1, cap_feat_dim=16, injection_layer_ids=(1, 3),
              perceiver_num_layers=3, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4, gist_max_text_len=32,
              axes_dims=(8, 4, 4), axes_lens=(64, 32, 32)),
         lambda n: dict(hidden_states=draw(n, 4, 8, 8), timestep=levels(n), encoder_hidden_states=draw(n, 3, 10, 16)),
         {"layers": [1, 4], "noise_refiner": [0], "perceiver.layers": [2]}, for_student=_without("encoder_hidden_states", {1})),
    Tiny("JoyImageEditTransformer3DModel", _JOY,
         lambda n: dict(hidden_states=draw(n, 4, 1, 4, 4), encoder_hidden_states=draw(n, 10, 16), timestep=levels(n, 500.0)),
         {"double_blocks": [0, 3]}),
    Tiny("JoyImageEditPlusTransformer3DModel", _JOY,
         lambda n: dict(hidden_states=draw(n, 2, 4, 1, 2, 2), encoder_hidden_states=draw(n, 10, 16), timestep=levels(n, 500.0),
                        shape_list=[[(1, 1, 1), (1, 1, 1)]] * n), {"double_blocks": [1, 3]}),
    *(Tiny(name, dict(num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=4, norm_num_groups=2, cross_attention_dim=16),
           lambda n: dict(hidden_states=draw(n, 8, 4, 4), encoder_hidden_states=draw(n, 10, 16)), {TRUNK: [0, 2]})
      for name in ("Transformer2DModel", "DreamLiteTransformer2DModel")),
    Tiny("TransformerTemporalModel", dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=4, norm_num_groups=1),
         lambda n: dict(hidden_states=draw(n * 2, 4, 4, 4), timestep=steps(n), num_frames=2), {TRUNK: [0, 2]}),
]  # fmt: skip
