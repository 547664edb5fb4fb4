"""How training calls a transformer class of diffusers: arguments of its forward pass, from latents, time and encoded texts.

Latents x are what the trunk trains on: after the autoencoder's normalisation, before packing. (B, C, h, w) of images, (B, C, F, h, w)
of video. A row per class is in `call_rows.py`; `called` makes of it the function that an objective calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from tinyfusion.blocks.tokens import to_tokens
from tinyfusion.conditioning.condition import Condition, ModelCall
from tinyfusion.core.errors import UserError
from tinyfusion.processes.time import TimeConvention

AXES = {4: "(images, channels, height, width)", 5: "(videos, channels, frames, height, width)"}
# time from 0 at the data to 1 at noise, or to 1000; the network predicts noise - data
UNIT_TIME, THOUSAND = TimeConvention(), TimeConvention("sigma", 1000.0)


@dataclass(frozen=True)
class CallContext:
    """What a call depends on besides the batch.

    config: config.json of the transformer. guidance: of models with guidance in the network, in plain units; None: what the
    pipeline has by default. frame_rate: frames per second of the videos. spatial_ratio, temporal_ratio: pixels and frames per cell
    of the latents; None: those of the published autoencoder. time_per_token: whether the pipeline gives every token a time
    (Wan 2.2 5B). levels: noise levels that the model is for, of two experts (Wan 2.2) its own. trim: whether masked texts are
    shortened to the longest of the batch. dtype: of the inputs; None: that of the weights.
    """

    config: Mapping[str, Any]
    guidance: float | None = None
    frame_rate: float = 25.0
    spatial_ratio: int | None = None
    temporal_ratio: int | None = None
    time_per_token: bool = False
    levels: tuple[float, float] = (0.0, 1.0)
    trim: bool = True
    dtype: torch.dtype | None = None

    @classmethod
    def of_folder(
        cls, config: Mapping[str, Any], model_index: Mapping[str, Any], vae: Mapping[str, Any], **settings: Any
    ) -> CallContext:
        """The context of a pipeline folder: config.json of its transformer, model_index.json, config.json of its autoencoder.

        settings: further fields. Empty mappings where a file is absent.
        """
        per_token = bool(model_index.get("expand_timesteps", False))
        ratios = dict(zip(("spatial_ratio", "temporal_ratio"), compression(vae), strict=True))
        return cls(config, **{"time_per_token": per_token, **ratios, **settings})

    def value(self, name: str, default: Any = None) -> Any:
        """A field of the config; `default` where a config.json lacks it."""
        return self.config.get(name, default)

    @property
    def name(self) -> str:
        """The class of the transformer."""
        return str(self.config.get("_class_name", "transformer"))


def compression(vae: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Pixels and frames per cell of an autoencoder's latents, from its config.json; None where that does not say them."""
    scaling, blocks = vae.get("spatio_temporal_scaling"), vae.get("block_out_channels")
    spatial, temporal = vae.get("spatial_compression_ratio"), vae.get("temporal_compression_ratio")
    if scaling is not None:  # LTX
        halvings = 2 ** sum(map(bool, scaling))
        spatial = spatial or vae.get("patch_size", 4) * halvings
        temporal = temporal or vae.get("patch_size_t", 1) * halvings
    if spatial is None and blocks is not None:
        spatial = 2 ** (len(blocks) - 1)
    return spatial, temporal


Arguments = Callable[[CallContext, Tensor, Tensor, Condition], dict[str, Any]]
Output = Callable[[CallContext, Any, Tensor], Tensor]
Patch = Callable[[Mapping[str, Any]], tuple[int, ...]]


def plain_output(context: CallContext, output: Any, x: Tensor) -> Tensor:
    """The output as it is: shaped like x, or with channels of a learned variance behind its own."""
    return output if isinstance(output, Tensor) else torch.stack(list(output))


@dataclass(frozen=True)
class TransformerCall:
    """How training calls a transformer class of diffusers.

    process: "flow" or "gaussian". texts: tensors of a `Condition` that it needs. arguments: (context, x, t, condition) -> keyword
    arguments of forward. output: (context, output of forward, x) -> prediction shaped like x. convention: of a flow's time and
    velocity. axes: of x. widths: tensor of the condition -> field of the config with the size of its last axis. patch: config ->
    cells per token along the last axes of x. packed: channels of the config per channel of x. guidance, spatial_ratio,
    temporal_ratio: what the published pipeline has where a context has None.
    """

    process: str
    texts: tuple[str, ...]
    arguments: Arguments
    output: Output = plain_output
    convention: TimeConvention = UNIT_TIME
    axes: int = 4
    widths: Mapping[str, str] = field(default_factory=dict)
    patch: Patch = lambda config: (int(config.get("patch_size", 2)),) * 2
    packed: int = 1
    guidance: float | None = None
    spatial_ratio: int = 8
    temporal_ratio: int = 4

    def resolved(self, context: CallContext) -> CallContext:
        """The context with the defaults of this class in place of None."""
        named = ("guidance", "spatial_ratio", "temporal_ratio")
        return replace(context, **{n: getattr(self, n) for n in named if getattr(context, n) is None})

    def tokens(self, config: Mapping[str, Any], shape: tuple[int, ...]) -> int:
        """Tokens of one image or video of this shape (C, ..., h, w), by which pipelines choose a shift."""
        sizes, patch = shape[1:], self.patch(config)
        return math.prod(size // cells for size, cells in zip(sizes, (1, *patch)[-len(sizes) :], strict=True))


def called(call: TransformerCall, context: CallContext) -> ModelCall:
    """(module, x, t, condition) -> prediction, shaped like x; what an objective calls.

    x, embeddings and pooled embeddings are given to the module in the type of its weights, the time in float32. The prediction has
    the type that the module returns. A condition may have further tensors: "guidance" (B,), in place of the context's; "concat"
    (B, C', ..., h, w), latents of an image, of a mask or of a control, which models with more channels take behind those of x;
    "image" (B, N, E), embeddings of an image, for Wan. The function raises UserError on latents or texts that the model cannot take.
    """
    context = call.resolved(context)

    def run(module: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        behind = condition.tensors.get("concat")
        check_latents(call, context, tuple(x.shape), 0 if behind is None else behind.shape[1])
        check_texts(call, context, condition.tensors)
        dtype = context.dtype or weight_dtype(module)
        cast = {
            name: tensor.to(dtype) if tensor.is_floating_point() and name != "guidance" else tensor
            for name, tensor in condition.tensors.items()
        }
        given = x.to(dtype) if behind is None else torch.cat([x.to(dtype), cast["concat"]], 1)
        arguments = call.arguments(context, given, t, Condition(cast))
        return call.output(context, module(**arguments, return_dict=False)[0], x)

    return run


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The floating-point type of most of a module's weights; small quantised types are passed over, and trained deltas, too."""
    sizes: dict[tuple[bool, torch.dtype], int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            key = not parameter.requires_grad, parameter.dtype
            sizes[key] = sizes.get(key, 0) + parameter.numel()
    return max(sizes, key=lambda key: (key[0], sizes[key]))[1] if sizes else torch.float32


# --------------------------------------------------------------------------------------------------------------- checks


def check_latents(call: TransformerCall, context: CallContext, shape: tuple[int, ...], behind: int = 0) -> None:
    """Raise UserError unless the model can take latents x of this shape (B, C, ..., h, w), with `behind` channels behind them."""
    name = context.name
    if len(shape) != call.axes:
        raise UserError(
            f"a {name} takes latents {AXES[call.axes]}; got {list(shape)}: encode the data set for this model"
        )
    wanted, channels = context.value("in_channels"), shape[1] + behind
    if wanted is not None and wanted != channels * call.packed:
        per = f" ({call.packed} per channel of the latents)" if call.packed > 1 else ""
        raise UserError(
            f"this {name} has in_channels {wanted}{per}; got latents of {channels} channels: encode the data set with its own "
            "autoencoder; a model that takes an image, a mask or a control in further channels needs them in its batches"
        )
    patch = call.patch(context.config)
    odd = [size for size, cells in zip(shape[-len(patch) :], patch, strict=True) if size % cells]
    if odd:
        cells, sizes = " x ".join(map(str, patch)), " x ".join(map(str, shape[2:]))
        raise UserError(
            f"a {name} takes latents in patches of {cells} cells; got {sizes}: encode at a size that they divide"
        )


def check_texts(call: TransformerCall, context: CallContext, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless a condition's tensors are those that the model takes, in its widths."""
    absent = [name for name in call.texts if name not in tensors]
    if absent:
        raise UserError(
            f"a {context.name} takes texts as {', '.join(call.texts)}; got {', '.join(tensors)}, no {absent[0]}: encode the prompts "
            "with the encoders of its own pipeline"
        )
    length, given = context.value("max_text_seq_length"), tensors["embeddings"].shape[1]
    if length is not None and length != given:
        raise UserError(
            f"this {context.name} takes texts of {length} tokens (max_text_seq_length); got {given}: encode the prompts with padding to "
            "that length"
        )
    for name, named in call.widths.items():
        wanted, width = context.value(named), tensors[name].shape[-1]
        wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
        if wanted is not None and width != wanted:
            raise UserError(
                f"this {context.name} takes {name} of width {wanted} ({named}); got {width}: encode the prompts with the encoders of "
                "its own pipeline"
            )


# ------------------------------------------------------------------------------------------------------ parts of a call


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): patches of 2 x 2 as tokens, a channel's cells side by side."""
    return to_tokens(x, 2).contiguous()


def unpacked(context: CallContext, tokens: Tensor, x: Tensor) -> Tensor:
    """The inverse of `packed`, for latents shaped like x."""
    height, width = (size // 2 for size in x.shape[-2:])
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2).contiguous()


def from_rows(context: CallContext, output: Tensor, x: Tensor) -> Tensor:
    """(B, h w, C) -> (B, C, h, w), of videos (B, F h w, C) -> (B, C, F, h, w)."""
    return output.transpose(1, 2).reshape(x.shape)


def plain_call(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """The arguments of a class that takes latents, time and embeddings by their usual names."""
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": condition["embeddings"]}


def masked_call(context: CallContext, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
    """As `plain_call`, with the embeddings' mask."""
    embeddings, mask = trimmed(context, condition)
    return {"hidden_states": x, "timestep": t, "encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


def grid(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3) positions (0, row, column), float32."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def without_values(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone: it is on the meta device, or a fake one by which memory is counted."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def trimmed(context: CallContext, condition: Condition) -> tuple[Tensor, Tensor]:
    """Embeddings (B, N, ...) and their mask (B, N), bool, without the tokens behind the longest text of the batch.

    Where tensors have no values every text is of full length.
    """
    embeddings, mask = condition["embeddings"], condition["mask"].bool()
    if not context.trim or without_values(mask):
        return embeddings, mask
    used = mask.any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return embeddings[:, :length], mask[:, :length]


def guidance_of(context: CallContext, x: Tensor, condition: Condition) -> Tensor:
    """(B,) guidance in plain units, float32: the condition's own tensor "guidance", else that of the context."""
    if "guidance" in condition.tensors:
        return condition["guidance"].reshape(len(x)).float()
    return torch.full((len(x),), float(context.guidance or 0.0), device=x.device)
