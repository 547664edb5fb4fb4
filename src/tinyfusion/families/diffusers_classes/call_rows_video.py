"""Calls of the transformer classes of video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.families.diffusers_classes.calls import (
    THOUSAND,
    CallContext,
    TransformerCall,
    from_rows,
    guidance_of,
    masked_call,
    plain_call,
)


def _patch(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Cells per token along frames, height and width."""
    return int(config.get("patch_size_t") or 1), int(config.get("patch_size", 2)), int(config.get("patch_size", 2))


def _wan(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    if context.time_per_token:
        patch = context.value("patch_size", (1, 2, 2))
        tokens = (x.shape[2] // patch[0]) * (x.shape[3] // patch[1]) * (x.shape[4] // patch[2])
        t = t[:, None].expand(-1, tokens)
    image = {"encoder_hidden_states_image": condition["image"]} if "image" in condition.tensors else {}
    return plain_call(context, x, t, condition) | image


def _ltx(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    frames, height, width = x.shape[2:]
    assert context.temporal_ratio is not None and context.spatial_ratio is not None
    return masked_call(context, x.flatten(2).transpose(1, 2), t, condition) | {
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (
            context.temporal_ratio / context.frame_rate,
            context.spatial_ratio,
            context.spatial_ratio,
        ),
    }


def _hunyuan(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    guided = context.value("guidance_embeds")
    return masked_call(context, x, t, condition) | {
        "pooled_projections": condition["pooled"],
        "guidance": guidance_of(context, x, condition) * 1000 if guided else None,
    }


def _cogvideox(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """Frames before channels; rotary positions of the larger models; ofs of image-to-video is that of its pipeline, 2."""
    arguments = plain_call(context, x.transpose(1, 2), t, condition) | {"image_rotary_emb": None}
    if context.value("use_rotary_positional_embeddings"):
        arguments["image_rotary_emb"] = _rotary(context, x)
    if context.value("ofs_embed_dim") is not None:
        arguments["ofs"] = x.new_full((1,), 2.0)
    return arguments


def _rotary(context: CallContext, x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, width of a head) cosines and sines of positions: frames, rows and columns; each angle twice, side by side.

    Without patches over time, rows and columns are scaled into a window of the training size that has the shape of the video.
    """
    patch_t, patch, _ = _patch(context.config)
    frames, rows, columns = x.shape[2] // patch_t, x.shape[3] // patch, x.shape[4] // patch
    width = context.value("attention_head_dim", 64)
    tall, wide = context.value("sample_height", 60) // patch, context.value("sample_width", 90) // patch
    if context.value("patch_size_t") is None:
        down, across = tall, wide
        if rows / columns > tall / wide:
            across = round(tall / rows * columns)
        else:
            down = round(wide / columns * rows)
        top, left = round((tall - down) / 2.0), round((wide - across) / 2.0)
        places = [
            torch.linspace(0, frames - 1, frames, device=x.device),
            torch.linspace(top, (top + down) * (rows - 1) / rows, rows, device=x.device),
            torch.linspace(left, (left + across) * (columns - 1) / columns, columns, device=x.device),
        ]
    else:
        places = [torch.arange(size, device=x.device).float() for size in (frames, rows, columns)]
    sizes = (width // 4, width // 8 * 3, width // 8 * 3)
    angles = [
        torch.outer(place, 10000.0 ** -(torch.arange(0, size, 2, device=x.device).float() / size)).repeat_interleave(2, 1)
        for place, size in zip(places, sizes, strict=True)
    ]  # fmt: skip
    shape = (frames, rows, columns, -1)
    whole = torch.cat(
        [angle.view([-1 if i == axis else 1 for i in range(3)] + [size]).expand(*shape[:3], size)
         for axis, (angle, size) in enumerate(zip(angles, sizes, strict=True))], -1
    ).reshape(frames * rows * columns, -1)  # fmt: skip
    return whole.cos(), whole.sin()


_MASKED_TEXTS = ("embeddings", "mask")

_WAN = TransformerCall(
    "flow",
    ("embeddings",),
    _wan,
    convention=THOUSAND,
    axes=5,
    widths={"embeddings": "text_dim"},
    patch=lambda config: tuple(config.get("patch_size", (1, 2, 2))),
)

VIDEO_CALLS: dict[str, TransformerCall] = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "SanaVideoTransformer3DModel": TransformerCall(
        "flow",
        _MASKED_TEXTS,
        masked_call,
        convention=THOUSAND,
        axes=5,
        widths={"embeddings": "caption_channels"},
        patch=lambda config: tuple(config.get("patch_size", (1, 2, 2))),
    ),
    "LTXVideoTransformer3DModel": TransformerCall(
        "flow",
        _MASKED_TEXTS,
        _ltx,
        from_rows,
        THOUSAND,
        axes=5,
        widths={"embeddings": "caption_channels"},
        patch=lambda config: (1, 1, 1),
        spatial_ratio=32,
        temporal_ratio=8,
    ),
    "HunyuanVideoTransformer3DModel": TransformerCall(
        "flow",
        ("embeddings", "mask", "pooled"),
        _hunyuan,
        convention=THOUSAND,
        axes=5,
        widths={"embeddings": "text_embed_dim", "pooled": "pooled_projection_dim"},
        patch=_patch,
        guidance=6.0,
    ),
    "CogVideoXTransformer3DModel": TransformerCall(
        "gaussian",
        ("embeddings",),
        _cogvideox,
        lambda context, output, x: output.transpose(1, 2),
        axes=5,
        widths={"embeddings": "text_embed_dim"},
        patch=_patch,
    ),
}
