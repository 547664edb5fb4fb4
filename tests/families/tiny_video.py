# ruff: noqa: E501
"""Classes of video, audio and the rest in small."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny import SINGLE, TRUNK, Tiny, draw, levels, mask, steps

_WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=32, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32)  # fmt: skip
_ANY = {name: value for name, value in _WAN.items() if name != "cross_attn_norm"}
_HUNYUAN = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=3, num_single_layers=3,
                num_refiner_layers=3, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
                rope_axes_dim=(2, 4, 4))  # fmt: skip
_REFINER = "context_embedder.token_refiner.refiner_blocks"
_THREE = {_REFINER: [1], TRUNK: [0], SINGLE: [2]}
_COG = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8, num_layers=4,
            sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=8)  # fmt: skip
_FACE = dict(is_train_face=True, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8,
             LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1, num_layers=6,
             cross_attn_interval=2)  # fmt: skip
_LTX2 = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
             audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=4,
             caption_channels=16, rope_double_precision=False)  # fmt: skip
_K5 = dict(in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=12, ff_dim=16, num_text_blocks=3,
           num_visual_blocks=4, axes_dims=(4, 4, 4))  # fmt: skip


def _wan(num: int, **more: Any) -> dict[str, Any]:
    return (
        dict(hidden_states=draw(num, 4, 5, 8, 8), encoder_hidden_states=draw(num, 10, 16), timestep=steps(num)) | more
    )


def _any(num: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_states=draw(num, 2, 4, 8, 8), timestep=torch.full((num, 2), 500.0), r_timestep=torch.full((num, 2), 250.0),
                encoder_hidden_states=draw(num, 10, 16)) | more  # fmt: skip


def _hunyuan(num: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_states=draw(num, 4, 3, 4, 4), timestep=steps(num), encoder_hidden_states=draw(num, 10, 16),
                pooled_projections=draw(num, 8), encoder_attention_mask=torch.ones(num, 10), guidance=levels(num, 6000.0)) | more  # fmt: skip


def _cog(num: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_states=draw(num, 1, 4, 8, 8), encoder_hidden_states=draw(num, 8, 8), timestep=steps(num)) | more


def _clip(num: int, text: int = 16, tokens: int = 10, **more: Any) -> dict[str, Any]:
    return (
        dict(hidden_states=draw(num, 4, 2, 8, 8), encoder_hidden_states=draw(num, tokens, text), timestep=steps(num))
        | more
    )


def _animate2(num: int) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return dict(hidden_states=list(draw(num, 4, 2, 4, 4)), timestep=torch.ones(num), encoder_hidden_states=list(draw(num, 8, 16)),
                condition_latents=list(draw(num, 8, 2, 4, 4)), encoder_hidden_states_image=draw(num, 4, 1280),
                kv_cache=WanAnimate2KVCache(4), kv_cache_mode="extract", seq_len=8,
                offset_grid_sizes=torch.tensor([[2, 2, 2]] * num))  # fmt: skip


def _helios(num: int) -> dict[str, Any]:
    one, four = torch.ones(num, 1), torch.ones(num, 4)
    return _wan(num, hidden_states=draw(num, 4, 2, 8, 8), indices_hidden_states=torch.ones(num, 2), indices_latents_history_short=one,
                indices_latents_history_mid=one, indices_latents_history_long=four, latents_history_short=draw(num, 4, 1, 8, 8),
                latents_history_mid=draw(num, 4, 1, 8, 8), latents_history_long=draw(num, 4, 4, 8, 8))  # fmt: skip


def _h3(num: int) -> dict[str, Any]:
    tags = torch.tensor([1] * 5 + [2] * 4 + [0] * 8)
    return dict(hidden_states=draw(num, 8, 16), audio_hidden_states=draw(num, 4, 6), encoder_hidden_states=draw(num, 5, 8),
                timestep=torch.tensor([0.7, 0.3]), timestep_indices=(tags == 2).long(), token_tags=tags,
                position_ids=torch.arange(17.0)[:, None].repeat(1, 3), text_indices=torch.arange(5), audio_indices=torch.arange(5, 9),
                video_indices=torch.arange(9, 17))  # fmt: skip


def _refiner(num: int) -> dict[str, Any]:
    from diffusers.models.transformers import SanaWMLTX2RefinerTransformer3DModel as Refiner

    needed = list(inspect.signature(Refiner.build_rotary_emb_for_absolute_positions).parameters)[1:]
    rotary = (draw(1, 32, 16), draw(1, 32, 16)) if needed else None
    return dict(hidden_states=draw(num, 32, 4), encoder_hidden_states=draw(num, 10, 16), timestep=torch.full((num, 32), 700.0),
                encoder_attention_mask=torch.ones(num, 10), video_rotary_emb=rotary)  # fmt: skip


VIDEO = [
    Tiny("WanTransformer3DModel", _WAN, _wan, {"blocks": [0, 3]}),
    Tiny("WanTransformer3DModel", _WAN | dict(image_dim=16, added_kv_proj_dim=24),
         lambda n: _wan(n, encoder_hidden_states_image=draw(n, 257, 16)), {"blocks": [1, 2]}, tag="image-to-video"),
    Tiny("SkyReelsV2Transformer3DModel", _WAN, _wan, {"blocks": [0, 2]}),
    Tiny("ChronoEditTransformer3DModel", _WAN | dict(rope_temporal_skip_len=8), lambda n: _wan(n, hidden_states=draw(n, 4, 2, 8, 8)),
         {"blocks": [1, 3]}),
    Tiny("WanVACETransformer3DModel", _WAN | dict(num_layers=6, vace_layers=[0, 2, 4], vace_in_channels=8),
         lambda n: _wan(n, control_hidden_states=draw(n, 8, 5, 8, 8)), {"blocks": [2, 3, 5]}),
    Tiny("WanAnimateTransformer3DModel",
         _WAN | dict(num_layers=6, in_channels=12, latent_channels=4, image_dim=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
                     motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
                     face_encoder_num_heads=2, inject_face_latents_blocks=2),
         lambda n: _wan(n, hidden_states=draw(n, 12, 5, 8, 8), encoder_hidden_states_image=draw(n, 12, 16),
                        pose_hidden_states=draw(n, 4, 4, 8, 8), face_pixel_values=draw(n, 3, 13, 16, 16)),
         {"blocks": [1, 2]}, adapters=(("face_adapter.1", 0),)),
    Tiny("WanAnimate2Transformer3DModel",
         dict(patch_size=(1, 2, 2), text_len=16, in_dim=12, dim=48, ffn_dim=32, freq_dim=32, text_dim=16, out_dim=4, num_heads=2, num_layers=4),
         _animate2, {"blocks": [0, 2]}, images=False),
    Tiny("AnyFlowTransformer3DModel", _ANY, _any, {"blocks": [0, 3]}),
    Tiny("AnyFlowFARTransformer3DModel", _ANY | dict(compressed_patch_size=(1, 4, 4), full_chunk_limit=3),
         lambda n: _any(n, hidden_states=draw(n, 4, 4, 8, 8), timestep=torch.full((n, 4), 500.0), r_timestep=torch.full((n, 4), 250.0),
                        chunk_partition=[2, 2]), {"blocks": [1, 2]}),
    Tiny("HeliosTransformer3DModel", {k: v for k, v in _WAN.items() if k != "rope_max_seq_len"} | dict(rope_dim=(4, 4, 4)), _helios,
         {"blocks": [0, 2]}),
    Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN, _hunyuan, _THREE),
    Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN | dict(image_condition_type="token_replace"), _hunyuan, _THREE, tag="token-replace"),
    Tiny("HunyuanVideoFramepackTransformer3DModel",
         _HUNYUAN | dict(patch_size=2, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
         lambda n: _hunyuan(n, image_embeds=draw(n, 12, 16), indices_latents=torch.ones(3), latents_clean=draw(n, 4, 2, 4, 4),
                            indices_latents_clean=torch.ones(2), latents_history_2x=draw(n, 4, 2, 4, 4), indices_latents_history_2x=torch.ones(2),
                            latents_history_4x=draw(n, 4, 8, 4, 4), indices_latents_history_4x=torch.ones(8)), _THREE),
    Tiny("HunyuanVideo15Transformer3DModel",
         dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=4, num_refiner_layers=3, mlp_ratio=2.0,
              text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=10, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v"),
         lambda n: dict(hidden_states=draw(n, 4, 3, 4, 4), timestep=levels(n, 500.0), encoder_hidden_states=draw(n, 6, 16),
                        encoder_hidden_states_2=draw(n, 4, 12), encoder_attention_mask=torch.ones(n, 6),
                        encoder_attention_mask_2=torch.ones(n, 4), image_embeds=torch.zeros(n, 3, 10)), {_REFINER: [0], TRUNK: [1, 3]}),
    Tiny("HunyuanImageTransformer2DModel",
         dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3, num_single_layers=3, num_refiner_layers=3,
              patch_size=(1, 1), guidance_embeds=True, text_embed_dim=16, text_embed_2_dim=12, rope_axes_dim=(4, 4)),
         lambda n: dict(hidden_states=draw(n, 4, 4, 4), timestep=levels(n, 500.0), encoder_hidden_states=draw(n, 6, 16),
                        encoder_attention_mask=torch.ones(n, 6), encoder_hidden_states_2=draw(n, 4, 12),
                        encoder_attention_mask_2=torch.ones(n, 4), guidance=levels(n, 3500.0)), _THREE),
    Tiny("CogVideoXTransformer3DModel", _COG, _cog, {TRUNK: [0, 2]}),
    Tiny("CogVideoXTransformer3DModel", _COG | dict(patch_size_t=2, use_rotary_positional_embeddings=True),
         lambda n: _cog(n, hidden_states=draw(n, 2, 4, 8, 8)), {TRUNK: [1, 3]}, tag="1.5"),
    Tiny("ConsisIDTransformer3DModel", _COG, _cog, {TRUNK: [1]}),
    Tiny("ConsisIDTransformer3DModel", _COG | _FACE, lambda n: _cog(n, id_vit_hidden=[draw(n, 2, 2)], id_cond=draw(n, 2)), {TRUNK: [2, 3]},
         adapters=(("perceiver_cross_attention.1", 1),), tag="face"),
    Tiny("LTXVideoTransformer3DModel",
         dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=4, caption_channels=16),
         lambda n: dict(hidden_states=draw(n, 32, 4), encoder_hidden_states=draw(n, 10, 16), timestep=steps(n),
                        encoder_attention_mask=mask(n, 10), num_frames=2, height=4, width=4), {TRUNK: [0, 2]}),
    Tiny("LTX2VideoTransformer3DModel", _LTX2,
         lambda n: dict(hidden_states=draw(n, 32, 4), audio_hidden_states=draw(n, 9, 4), encoder_hidden_states=draw(n, 10, 16),
                        audio_encoder_hidden_states=draw(n, 10, 16), timestep=levels(n, 700.0), encoder_attention_mask=mask(n, 10), num_frames=2,
                        height=4, width=4, audio_num_frames=9, fps=25.0), {TRUNK: [0, 3]}),
    Tiny("MochiTransformer3DModel",
         dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=4, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
              time_embed_dim=4, max_sequence_length=16),
         lambda n: _clip(n, tokens=16, encoder_attention_mask=mask(n, 16)), {TRUNK: [0, 3]}),
    Tiny("AllegroTransformer3DModel",
         dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4, cross_attention_dim=16, sample_width=8,
              sample_height=8, sample_frames=8, caption_channels=8), lambda n: _clip(n, 8), {TRUNK: [0, 2]}),
    Tiny("LatteTransformer3DModel",
         dict(sample_size=8, num_layers=4, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=8, in_channels=4,
              cross_attention_dim=8, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
              norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=4),
         lambda n: _clip(n, 8, hidden_states=draw(n, 4, 4, 8, 8)), {TRUNK: [1, 3], "temporal_transformer_blocks": [1, 3]}),
    Tiny("CosmosTransformer3DModel",  # a padding mask would need torchvision
         dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=4, mlp_ratio=2, text_embed_dim=16,
              adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False),
         lambda n: _clip(n, attention_mask=torch.ones(n, 10), fps=30), {TRUNK: [0, 3]}),
    Tiny("Cosmos3OmniTransformer",
         dict(head_dim=6, hidden_act="relu2", hidden_size=12, intermediate_size=24, latent_channel=2, latent_patch_size=1, num_attention_heads=2,
              num_hidden_layers=4, num_key_value_heads=1, patch_latent_dim=2, qk_norm_for_text=False, rope_axes_dim=[1, 1, 1], vocab_size=32),
         lambda n: dict(input_ids=torch.tensor([1, 2]), text_indexes=torch.tensor([0, 1]), position_ids=torch.arange(6).repeat(3, 1), und_len=2,
                        sequence_length=6, vision_tokens=[draw(1, 2, 1, 2, 2)], vision_token_shapes=[(1, 2, 2)],
                        vision_sequence_indexes=torch.arange(2, 6), vision_mse_loss_indexes=torch.arange(2, 6), vision_timesteps=torch.ones(4),
                        vision_noisy_frame_indexes=[torch.tensor([0])]), {"layers": [0, 2]}, images=False),
    Tiny("EasyAnimateTransformer3DModel",
         dict(attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=3, num_layers=5, out_channels=4, patch_size=2,
              sample_height=60, sample_width=90, text_embed_dim=16, time_embed_dim=8), _clip, {TRUNK: [1, 4]}),
    Tiny("MotifVideoTransformer3DModel",
         dict(in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3, num_single_layers=5, num_decoder_layers=2,
              patch_size=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4), enable_text_cross_attention_dual=True,
              enable_text_cross_attention_single=True),
         lambda n: _clip(n, hidden_states=draw(n, 9, 3, 4, 4)), {TRUNK: [0], SINGLE: [1, 4]}),
    Tiny("Kandinsky5Transformer3DModel", _K5,
         lambda n: dict(hidden_states=draw(n, 2, 8, 8, 4), encoder_hidden_states=draw(n, 10, 16), timestep=levels(n, 500.0),
                        pooled_projections=draw(n, 8), visual_rope_pos=(torch.arange(2), torch.arange(4), torch.arange(4)),
                        text_rope_pos=torch.arange(10)), {"text_transformer_blocks": [1], "visual_transformer_blocks": [0, 3]}),
    Tiny("Kandinsky6Transformer3DModel", _K5 | dict(visual_cond=False, in_audio_dim=6, out_audio_dim=6),
         lambda n: dict(hidden_states=draw(n, 2, 8, 8, 4), encoder_hidden_states=draw(n, 10, 16), timestep=levels(n, 500.0),
                        pooled_projections=draw(n, 8), audio_hidden_states=draw(n, 7, 6)),
         {"video_text_transformer_blocks": [0], "audio_text_transformer_blocks": [2], "visual_transformer_blocks": [1, 3]}),
    Tiny("Kandinsky6SRTransformer3DModel",
         dict(in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=48, ff_dim=16, num_visual_blocks=4, axes_dims=(16, 16, 16)),
         lambda n: dict(hidden_states=draw(n, 1, 16, 16, 9), timestep=levels(n, 500.0)), {"visual_transformer_blocks": [0, 2]}),
    Tiny("SanaVideoTransformer3DModel",
         dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=4, num_cross_attention_heads=2,
              cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16, sample_size=8, rope_max_seq_len=32),
         lambda n: _clip(n, hidden_states=draw(n, 4, 4, 8, 8)), {TRUNK: [1, 2]}),
    Tiny("SanaWMTransformer3DModel",
         dict(in_channels=4, num_layers=8, hidden_size=48, num_attention_heads=2, linear_head_dim=24, softmax_every_n=4, caption_channels=16,
              chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=8),
         lambda n: dict(hidden_states=draw(n, 4, 3, 4, 4), timestep=torch.full((n, 1, 3), 500.0), encoder_hidden_states=draw(n, 1, 10, 16),
                        encoder_attention_mask=torch.ones(n, 10)), {"blocks": [1, 2, 3, 4]}),
    Tiny("SanaWMLTX2RefinerTransformer3DModel", _LTX2, _refiner, {TRUNK: [0, 2]}),
    Tiny("MiniMaxH3Transformer3DModel",
         dict(num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=4, num_refiner_layers=3, ffn_dim=32, in_channels=4,
              audio_in_channels=6, text_dim=8, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2),
         _h3, {TRUNK: [0, 3], "token_refiner.refiner_blocks": [1]}),
    # ---- audio and the rest
    Tiny("AceStepTransformer1DModel",
         dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, in_channels=24,
              audio_acoustic_hidden_dim=8, sliding_window=2),
         lambda n: dict(hidden_states=draw(n, 16, 8), timestep=levels(n), timestep_r=levels(n, 0.3), encoder_hidden_states=draw(n, 10, 32),
                        context_latents=draw(n, 16, 16)), {"layers": [0]}),
    Tiny("StableAudioDiTModel",
         dict(sample_size=8, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2, num_key_value_attention_heads=1,
              out_channels=4, cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=8),
         lambda n: dict(hidden_states=draw(n, 4, 8), timestep=steps(n), encoder_hidden_states=draw(n, 10, 8),
                        global_hidden_states=draw(n, 1, 8), rotary_embedding=(draw(9, 4), draw(9, 4))), {TRUNK: [0, 2]}),
    Tiny("StableAudio3DiTModel",
         dict(io_channels=8, embed_dim=32, depth=4, num_heads=4, cond_token_dim=16, global_cond_dim=12, local_add_cond_dim=5,
              timestep_features_dim=16, ff_mult=2, num_memory_tokens=3, use_differential_attention=False),
         lambda n: dict(hidden_states=draw(n, 8, 16), timestep=levels(n), encoder_hidden_states=draw(n, 5, 16),
                        global_hidden_states=draw(n, 12)), {TRUNK: [1, 3]}),
    Tiny("LongCatAudioDiTTransformer", dict(dit_dim=64, dit_depth=4, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False),
         lambda n: dict(hidden_states=draw(n, 16, 8), encoder_hidden_states=draw(n, 10, 32), encoder_attention_mask=mask(n, 10),
                        attention_mask=mask(n, 16), timestep=levels(n)), {"blocks": [0, 3]}),
    Tiny("MiniMaxMusic3Transformer1DModel",
         dict(in_channels=8, condition_dim=16, num_layers=4, num_attention_heads=2, attention_head_dim=8, ff_inner_dim=32, rotary_dim=4,
              fourier_embedding_dim=8),
         lambda n: dict(hidden_states=draw(n, 8, 24), encoder_hidden_states=draw(n, 24, 16), timestep=levels(n, 0.5)), {TRUNK: [1, 2]}),
    Tiny("MiniMaxMusic3RVQDepthDecoder",
         dict(hidden_size=16, num_layers=4, num_attention_heads=2, intermediate_size=32, audio_vocab_size=16, num_codebooks=4,
              max_position_embeddings=8), lambda n: dict(inputs_embeds=draw(n, 3, 16)), {"layers": [0, 2]}),
    Tiny("PriorTransformer",
         dict(num_attention_heads=2, attention_head_dim=4, num_layers=4, embedding_dim=8, num_embeddings=7, additional_embeddings=4),
         lambda n: dict(hidden_states=draw(n, 8), timestep=2, proj_embedding=draw(n, 8), encoder_hidden_states=draw(n, 7, 8)), {TRUNK: [0, 3]}),
    Tiny("T5FilmDecoder",
         dict(input_dims=8, targets_length=8, d_model=16, num_layers=4, num_heads=2, d_kv=8, d_ff=16, dropout_rate=0.0),
         lambda n: dict(encodings_and_masks=[(draw(n, 5, 16), torch.ones(n, 5))], decoder_input_tokens=draw(n, 8, 8),
                        decoder_noise_time=levels(n, 0.5)), {"decoders": [1, 3]}),
]  # fmt: skip
