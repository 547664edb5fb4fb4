"""Random calls of a transformer class of diffusers, of any size: the arguments that its pipeline passes, with random values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.families.diffusers_classes.calls import CallContext, TransformerCall

_IMAGE_TOKENS, _TEXT_TOKENS = 257, 512  # of Wan from image to video, which finds the image before a text of this length
_MASKED = 2  # tokens at the end of a text, fewer in every further one


@dataclass(frozen=True)
class CallSizes:
    """Sizes of a call: images (or videos), patches of the latents along frames, height and width, tokens of a text."""

    images: int = 2
    frames: int = 3
    rows: int = 4
    columns: int = 6
    tokens: int = 10


def random_call(
    call: TransformerCall, context: CallContext, sizes: CallSizes, generator: torch.Generator
) -> dict[str, Any]:
    """Keyword arguments of forward, float32 and integers, every image with values of its own.

    context: with all fields of the config, also those that a config.json leaves to its class; it does not trim texts, so that the
    arguments are the same for all values of a mask.
    """

    def normals(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    config, num = context.config, sizes.images
    cells = call.patch(config)
    patches = (sizes.frames, sizes.rows, sizes.columns)[-(call.axes - 2) :]
    spatial = [size * patch for size, patch in zip(patches, (1, *cells)[-len(patches) :], strict=True)]
    channels = int(config["in_channels"]) // call.packed
    widths = {name: config[named] for name, named in call.widths.items()}
    widths = {name: int(width[0] if isinstance(width, list | tuple) else width) for name, width in widths.items()}
    with_image = config.get("image_dim") is not None
    tokens = _TEXT_TOKENS if with_image else int(config.get("max_text_seq_length") or sizes.tokens)
    layers = (int(config["num_text_layers"]),) if "num_text_layers" in config else ()
    tensors = {"embeddings": normals(num, tokens, *layers, widths["embeddings"])}
    if "mask" in call.texts:
        lengths = tokens - 1 - torch.arange(num) % _MASKED
        tensors["mask"] = torch.arange(tokens).expand(num, -1) < lengths[:, None]
    if "pooled" in call.texts:
        tensors["pooled"] = normals(num, widths["pooled"])
    if "llama" in call.texts:
        tensors["llama"] = normals(num, max(config["llama_layers"]) + 1, tokens, int(config["caption_channels"][1]))
    if with_image:
        tensors["image"] = normals(num, _IMAGE_TOKENS, int(config["image_dim"]))
    x, share = normals(num, channels, *spatial), torch.rand(num, generator=generator)
    t = (share * 999).long() if call.process == "gaussian" else call.convention.at_clean(share)
    return call.arguments(context, x, t, Condition(tensors))
