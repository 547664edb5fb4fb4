"""Calls of the transformer classes of images, and the table of all: what each pipeline of diffusers gives its transformer.

Written from the pipelines and training examples of diffusers 0.42; `tests/families/test_calls.py` compares every row with what the
pipeline itself passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.errors import UserError
from tinyfusion.data.recorded_batches import RowLayout
from tinyfusion.families.diffusers_classes.call_rows_video import VIDEO_CALLS
from tinyfusion.families.diffusers_classes.calls import (
    THOUSAND,
    CallContext,
    TransformerCall,
    from_rows,
    grid,
    guidance_of,
    masked_call,
    packed,
    plain_call,
    trimmed,
    unpacked,
    without_values,
)
from tinyfusion.processes.time import TimeConvention

_LONGCAT_TEXT = 512  # tokens


def _text_ids(condition: Condition) -> Tensor:
    embeddings = condition["embeddings"]
    return torch.zeros(embeddings.shape[1], 3, device=embeddings.device)


def _counted_text_ids(condition: Condition) -> Tensor:
    """Positions (0, n, n) of text token n."""
    ids = _text_ids(condition)
    ids[:, 1:] = torch.arange(len(ids), device=ids.device)[:, None]
    return ids


def _guidance(context: CallContext, x: Tensor, condition: Condition) -> dict[str, Any]:
    return {"guidance": guidance_of(context, x, condition) if context.value("guidance_embeds") else None}


# ----------------------------------------------------------------------------------------------------- FLUX and its kind


def _flux_tokens(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return plain_call(context, packed(x), t, condition) | {
        "txt_ids": _text_ids(condition),
        "img_ids": grid(x.shape[-2] // 2, x.shape[-1] // 2, x.device),
    }


def _flux(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    pooled = {"pooled_projections": condition["pooled"]}
    return _flux_tokens(context, x, t, condition) | pooled | _guidance(context, x, condition)


def _bria(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return _flux_tokens(context, x, t, condition) | _guidance(context, x, condition)


def _ovis(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return _flux_tokens(context, x, t, condition) | {"txt_ids": _counted_text_ids(condition)}


def _longcat(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    arguments = _flux_tokens(context, x, t, condition)
    start = torch.tensor([1.0, *[_LONGCAT_TEXT] * 2], device=x.device)  # of the image, behind a text of full length
    return arguments | {"txt_ids": _counted_text_ids(condition), "img_ids": arguments["img_ids"] + start}


def _flux2(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    num, _, height, width = x.shape
    embeddings = condition["embeddings"]
    image = torch.nn.functional.pad(grid(height, width, x.device), (0, 1)).long()
    text = torch.nn.functional.pad(torch.arange(embeddings.shape[1], device=x.device)[:, None], (3, 0))
    return {
        "hidden_states": x.flatten(2).transpose(1, 2),
        "timestep": t,
        "encoder_hidden_states": embeddings,
        "txt_ids": text.expand(num, -1, -1),
        "img_ids": image.expand(num, -1, -1),
    } | _guidance(context, x, condition)


def _qwen(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    embeddings, mask = trimmed(context, condition)
    return {
        "hidden_states": packed(x),
        "timestep": t,
        "encoder_hidden_states": embeddings,
        "encoder_hidden_states_mask": None if without_values(mask) or bool(mask.all()) else mask,
        "img_shapes": [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x),
    } | _guidance(context, x, condition)


def _krea2(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    arguments, image = masked_call(context, packed(x), t, condition), grid(x.shape[-2] // 2, x.shape[-1] // 2, x.device)
    text = image.new_zeros(arguments["encoder_hidden_states"].shape[1], 3)
    return arguments | {"position_ids": torch.cat([text, image])}


# ------------------------------------------------------------------------------------------------------- latents as they are


def _sd3(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return plain_call(context, x, t, condition) | {"pooled_projections": condition["pooled"]}


def _prx(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    embeddings, mask = trimmed(context, condition)
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": embeddings, "attention_mask": mask}


def _ernie(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    embeddings, mask = trimmed(context, condition)
    return {"hidden_states": x, "timestep": t, "text_bth": embeddings, "text_lens": mask.sum(1)}


def _sana(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    arguments = masked_call(context, x, t * context.value("timestep_scale", 1.0), condition)
    if context.value("guidance_embeds"):  # Sprint
        scale = context.value("guidance_embeds_scale", 0.1)
        arguments["guidance"] = guidance_of(context, x, condition) * scale
    return arguments


def _pixart(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    use = context.value("use_additional_conditions")
    if context.value("sample_size", 128) == 128 if use is None else use:  # PixArt-alpha at 1024
        assert context.spatial_ratio is not None
        height, width = (size * context.spatial_ratio for size in x.shape[-2:])
        sizes = {
            "resolution": torch.tensor([[height, width]] * len(x), dtype=x.dtype, device=x.device),
            "aspect_ratio": torch.tensor([[height / width]] * len(x), dtype=x.dtype, device=x.device),
        }
    return masked_call(context, x, t, condition) | {"added_cond_kwargs": sizes}


def _z_image(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    rows, masks = condition["embeddings"], condition["mask"].bool()
    texts = list(rows) if without_values(masks) else [row[mask] for row, mask in zip(rows, masks, strict=True)]
    return {"x": list(x.unsqueeze(2)), "t": t, "cap_feats": texts}


def _cogview4(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    assert context.spatial_ratio is not None
    pixels = [size * context.spatial_ratio for size in x.shape[-2:]]
    size = torch.tensor([pixels] * len(x), dtype=x.dtype, device=x.device)
    return plain_call(context, x, t, condition) | {
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def _hidream(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    return {
        "hidden_states": x,
        "timesteps": t,
        "encoder_hidden_states_t5": condition["embeddings"],
        "encoder_hidden_states_llama3": condition["llama"].transpose(0, 1),  # (B, layers, N, E): layers first
        "pooled_embeds": condition["pooled"],
    }


def _from_tokens(context: CallContext, output: Tensor, x: Tensor) -> Tensor:
    """HiDream in training returns tokens (B, C, N, cells), padded to the largest image; in inference latents."""
    if output.shape == x.shape:
        return output
    num, channels, height, width = x.shape
    cells = int(context.value("patch_size"))
    rows, columns = height // cells, width // cells
    tokens = output[:, :, : rows * columns].reshape(num, channels, rows, columns, cells, cells)
    return tokens.transpose(3, 4).reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------- table

_FLUX_KIND: dict[str, Any] = {
    "output": unpacked,
    "patch": lambda config: (2, 2),
    "packed": 4,
    "widths": {"embeddings": "joint_attention_dim"},
}
_POOLED = {"embeddings": "joint_attention_dim", "pooled": "pooled_projection_dim"}
_PLAIN_TEXTS, _MASKED_TEXTS, _POOLED_TEXTS = ("embeddings",), ("embeddings", "mask"), ("embeddings", "pooled")

CALLS: Mapping[str, TransformerCall] = MappingProxyType(
    {
        "FluxTransformer2DModel": TransformerCall(
            "flow", _POOLED_TEXTS, _flux, **{**_FLUX_KIND, "widths": _POOLED}, guidance=3.5
        ),
        "Flux2Transformer2DModel": TransformerCall(
            "flow",
            _PLAIN_TEXTS,
            _flux2,
            from_rows,
            widths={"embeddings": "joint_attention_dim"},
            patch=lambda config: (1, 1),
            guidance=4.0,
            spatial_ratio=16,
        ),
        "OvisImageTransformer2DModel": TransformerCall("flow", _PLAIN_TEXTS, _ovis, **_FLUX_KIND),
        "LongCatImageTransformer2DModel": TransformerCall("flow", _PLAIN_TEXTS, _longcat, **_FLUX_KIND),
        "BriaTransformer2DModel": TransformerCall("flow", _PLAIN_TEXTS, _bria, convention=THOUSAND, **_FLUX_KIND),
        "QwenImageTransformer2DModel": TransformerCall("flow", _MASKED_TEXTS, _qwen, **_FLUX_KIND),
        "Krea2Transformer2DModel": TransformerCall(
            "flow", _MASKED_TEXTS, _krea2, **{**_FLUX_KIND, "widths": {"embeddings": "text_hidden_dim"}}
        ),
        "SD3Transformer2DModel": TransformerCall("flow", _POOLED_TEXTS, _sd3, convention=THOUSAND, widths=_POOLED),
        "AuraFlowTransformer2DModel": TransformerCall(
            "flow", _PLAIN_TEXTS, plain_call, widths={"embeddings": "joint_attention_dim"}
        ),
        "SanaTransformer2DModel": TransformerCall(
            "flow",
            _MASKED_TEXTS,
            _sana,
            convention=THOUSAND,
            widths={"embeddings": "caption_channels"},
            patch=lambda config: (int(config.get("patch_size", 1)),) * 2,
            guidance=4.5,
            spatial_ratio=32,
        ),
        "PixArtTransformer2DModel": TransformerCall(
            "gaussian", _MASKED_TEXTS, _pixart, widths={"embeddings": "caption_channels"}
        ),
        "ZImageTransformer2DModel": TransformerCall(
            "flow",
            _MASKED_TEXTS,
            _z_image,
            lambda context, output, x: torch.stack(output).squeeze(2),  # of the axis of frames
            TimeConvention("1 - sigma", 1.0, "data - noise"),
            widths={"embeddings": "cap_feat_dim"},
            patch=lambda config: (int((config.get("all_patch_size") or [2])[0]),) * 2,
        ),
        "Lumina2Transformer2DModel": TransformerCall(
            "flow",
            _MASKED_TEXTS,
            masked_call,
            convention=TimeConvention("1 - sigma", 1.0, "data - noise"),
            widths={"embeddings": "cap_feat_dim"},
        ),
        "PRXTransformer2DModel": TransformerCall("flow", _MASKED_TEXTS, _prx, widths={"embeddings": "context_in_dim"}),
        "ErnieImageTransformer2DModel": TransformerCall(
            "flow",
            _MASKED_TEXTS,
            _ernie,
            convention=THOUSAND,
            widths={"embeddings": "text_in_dim"},
            patch=lambda config: (int(config.get("patch_size", 1)),) * 2,
            spatial_ratio=16,
        ),
        "CogView4Transformer2DModel": TransformerCall(
            "flow", _PLAIN_TEXTS, _cogview4, convention=THOUSAND, widths={"embeddings": "text_embed_dim"}
        ),
        "HiDreamImageTransformer2DModel": TransformerCall(
            "flow",
            ("embeddings", "llama", "pooled"),
            _hidream,
            _from_tokens,
            convention=TimeConvention("sigma", 1000.0, "data - noise"),
            widths={"embeddings": "caption_channels", "pooled": "text_emb_dim"},
        ),
    }
    | VIDEO_CALLS
)

# classes whose recorded calls do not hold their images along axis 0, or whose texts have lengths of their own
LAYOUTS: Mapping[str, RowLayout] = {
    # (layers, images, tokens, channels)
    "HiDreamImageTransformer2DModel": RowLayout(axes={"encoder_hidden_states_llama3": 1}),
    "QwenImageTransformer2DModel": RowLayout(texts={"encoder_hidden_states": "encoder_hidden_states_mask"}),
    "ErnieImageTransformer2DModel": RowLayout(texts={"text_bth": None}),  # text_lens says which tokens are real
}


def call_of(config: Mapping[str, Any]) -> TransformerCall:
    """The call of the class that a config.json names. Raises UserError on a class without one."""
    name = str(config.get("_class_name"))
    if name not in CALLS:
        raise UserError(
            f"training does not know how to call a {name}; it calls {', '.join(sorted(CALLS))}: remove its blocks with the criteria "
            "that train nothing, on recorded calls (--inputs)"
        )
    return CALLS[name]
