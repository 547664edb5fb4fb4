"""KL-16, the autoencoder of Li et al. (arXiv 2406.11838): its file into the class of diffusers that computes the same.

Its keys are those of latent diffusion (Rombach et al., arXiv 2112.10752). The network is a plain `AutoencoderKL`: 16
channels at a sixteenth of the side, attention on the lowest level of the encoder and in both middles, none on the levels of
the decoder. Models see 0.2325 times a sample of the posterior; the mean over ImageNet is left in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.weights import fetch_weights, known_weights
from tinyfusion.families.tensor_checks import in_float32
from tinyfusion.models.statedicts import find_state_dict
from tinyfusion.models.tensors import read_tensor_file

SCALE = 0.2325
CHANNELS = 16
FACTOR = 16  # pixels per latent cell and side
_LEVELS = 5
CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * _LEVELS,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "latent_channels": CHANNELS,
    "norm_num_groups": 32,
    "scaling_factor": SCALE,
}
_MARK = "decoder.conv_in.weight"  # a tensor by which its files are known
_FILES = (".ckpt", ".pt", ".pth", ".safetensors")
# parts of a key of latent diffusion to those of diffusers
_PARTS = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.", lambda match: f".up_blocks.{_LEVELS - 1 - int(match[1])}.resnets."),
    (r"\.up\.(\d)\.upsample\.", lambda match: f".up_blocks.{_LEVELS - 1 - int(match[1])}.upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_ATTENTION_PARTS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def kl16_file(name: str) -> Path | None:
    """The file that `name` means, a path or known weights of kind "autoencoder" (fetched where needed); None for other names."""
    if Path(name).is_file() and Path(name).suffix in _FILES:
        return Path(name)
    known = known_weights().get(name)
    return fetch_weights(name) if known is not None and known.kind == "autoencoder" else None


def open_kl16(path: Path) -> nn.Module:
    """The `AutoencoderKL` of a file with the published keys, float32, frozen, in eval mode.

    Raises UserError where a tensor is missing, too many, of another shape, or not finite.
    """
    tensors = to_diffusers(find_state_dict(read_tensor_file(path), [_MARK], "raw", path).tensors)
    from diffusers import AutoencoderKL  # late: seconds

    autoencoder_class: Any = AutoencoderKL
    with torch.device("meta"):
        module: nn.Module = autoencoder_class(**CONFIG)
    state = in_float32(tensors, module.state_dict(), f"{path} does not hold the autoencoder KL-16")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of diffusers, whose attention has linear layers for 1 x 1 convolutions."""
    renamed = {}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in _PARTS:
            name = re.sub(pattern, replacement, name)
        inside = re.fullmatch(r"(.*\.attentions\.\d)\.(\w+)\.(weight|bias)", name)
        if inside and inside[2] in _ATTENTION_PARTS:
            name = f"{inside[1]}.{_ATTENTION_PARTS[inside[2]]}.{inside[3]}"
            value = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        renamed[name] = value
    return renamed
