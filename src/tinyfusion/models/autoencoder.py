"""The autoencoder between images and latents: any `AutoencoderKL` of diffusers, from a folder or by its hub id, or KL-16.

KL-16 of Li et al. (arXiv 2406.11838) is a file with the keys of latent diffusion (Rombach et al., arXiv 2112.10752), loaded into
the class of diffusers that computes the same: 16 channels at a sixteenth of the side, attention on the lowest level of the
encoder and in both middles, none on the levels of the decoder. Models see 0.2325 times a sample of the posterior; the mean over
ImageNet is not removed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import explained, read_json_object
from tinyfusion.core.tensors import digest_of, read_folder_weights, read_tensor_file
from tinyfusion.core.weights import fetch_weights, known_weights
from tinyfusion.families.tensor_checks import check_finite, check_sizes, in_float32
from tinyfusion.models.hub import DIFFUSERS_WEIGHTS, autoencoder_folder
from tinyfusion.models.statedicts import find_state_dict

SCALE_OF_CLASS = 0.18215  # the default of AutoencoderKL
LARGEST_SCALE = 1e6  # of latents; far beyond every published one
_LEVELS = 16  # of an autoencoder at most, each of which halves the side
_SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "in_channels", "out_channels", "norm_num_groups",
          "down_block_types", "up_block_types")  # fmt: skip

_KL16_FILES = (".ckpt", ".pt", ".pth", ".safetensors")
_KL16_MARK = "decoder.conv_in.weight"  # a tensor by which its files are recognised
_KL16_LEVELS = 5
KL16_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * _KL16_LEVELS,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.2325,
}
# patterns in keys of latent diffusion -> keys of diffusers
_KL16_KEYS = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.", lambda match: f".up_blocks.{_KL16_LEVELS - 1 - int(match[1])}.resnets."),
    (r"\.up\.(\d)\.upsample\.", lambda match: f".up_blocks.{_KL16_LEVELS - 1 - int(match[1])}.upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_KL16_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class Autoencoder:
    """A frozen `AutoencoderKL` in float32.

    Models see (z - shift) x scale of its latents z. channels: of a latent; factor: pixels per latent cell and side.
    name: as given by the user.
    """

    module: nn.Module
    name: str
    scale: float
    shift: float
    channels: int
    factor: int

    def moments(self, pixels: Tensor) -> Tensor:
        """(N, 2 C, H / factor, W / factor) float32: mean and log-variance of the posterior of (N, 3, H, W) in [-1, 1]."""
        with torch.inference_mode():
            posterior = self.module.encode(pixels).latent_dist  # type: ignore[operator]
            return torch.cat([posterior.mean, posterior.logvar], 1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) float32, about [-1, 1], of latents as models see them."""
        with torch.inference_mode():
            return self.module.decode(latents / self.scale + self.shift).sample.float()  # type: ignore[operator]

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior as models see it; moments as above, noise (N, C, h, w) standard normal."""
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + torch.exp(0.5 * log_variance) * noise - self.shift) * self.scale

    def hash(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name."""
        return hash_of(self.module)


def hash_of(module: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of a module, sorted by name."""
    return str(digest_of(module.state_dict(), str).hexdigest())


def open_autoencoder(name: str) -> Autoencoder:
    """The autoencoder of a folder or hub id, alone or as the `vae` of a pipeline; or KL-16, by its file or known name.

    Raises UserError if there is none, if it has another class, and if its weights are missing, damaged or not finite.
    """
    if Path(name).is_file() and Path(name).suffix in _KL16_FILES:
        return _open_kl16(Path(name), name)
    if (known := known_weights().get(name)) is not None and known.kind == "autoencoder":
        return _open_kl16(fetch_weights(name), name)
    folder = autoencoder_folder(name)
    config = _config(folder)
    tensors, _ = read_folder_weights(folder, DIFFUSERS_WEIGHTS)
    check_sizes({size: config[size] for size in _SIZES if size in config}, tensors, str(folder / "config.json"))
    check_finite(tensors, f"the weights in {folder} are damaged")
    del tensors
    # of diffusers, safetensors, pickle or json
    with explained(f"{folder} cannot be opened as an AutoencoderKL", Exception), quiet_logs():
        from diffusers import AutoencoderKL  # late: seconds

        load: Any = AutoencoderKL.from_pretrained
        module, report = load(str(folder), output_loading_info=True, torch_dtype=torch.float32)
    check_loaded(report, folder)
    return _of_config(module, name, config)


def _of_config(module: nn.Module, name: str, config: Mapping[str, Any]) -> Autoencoder:
    module.eval().requires_grad_(False)
    scale, shift = config.get("scaling_factor", SCALE_OF_CLASS), config.get("shift_factor") or 0.0
    channels, factor = config.get("latent_channels", 4), 2 ** (len(config["block_out_channels"]) - 1)
    return Autoencoder(module, name, float(scale), float(shift), int(channels), factor)


def _open_kl16(path: Path, name: str) -> Autoencoder:
    """KL-16 from its file. Raises UserError on missing, extra, misshapen or non-finite tensors."""
    tensors = kl16_to_diffusers(find_state_dict(read_tensor_file(path), [_KL16_MARK], "raw", path).tensors)
    from diffusers import AutoencoderKL  # late: seconds

    autoencoder_class: Any = AutoencoderKL
    with torch.device("meta"):
        module: nn.Module = autoencoder_class(**KL16_CONFIG)
    state = in_float32(tensors, module.state_dict(), f"{path} does not hold the autoencoder KL-16")
    module.load_state_dict(state, assign=True)
    return _of_config(module, name, KL16_CONFIG)


def kl16_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the keys of diffusers, whose attention has linear layers for 1 x 1 convolutions."""
    renamed = {}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in _KL16_KEYS:
            name = re.sub(pattern, replacement, name)
        inside = re.fullmatch(r"(.*\.attentions\.\d)\.(\w+)\.(weight|bias)", name)
        if inside and inside[2] in _KL16_ATTENTION:
            name = f"{inside[1]}.{_KL16_ATTENTION[inside[2]]}.{inside[3]}"
            value = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        renamed[name] = value
    return renamed


def check_loaded(report: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError unless `report`, of `from_pretrained`, lists no missing, unexpected or misshapen tensor."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if odd := [str(key) for key in report.get(what) or ()]:
            raise UserError(
                f"the weights in {folder} do not go with its config.json: {what} {', '.join(sorted(odd)[:3])}"
            )


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Silence log lines of other libraries; errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence log lines and progress bars of diffusers and transformers."""
    with no_progress_bars(), quiet_logs():
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers about the loading of weights."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    for each in shown:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()


def _config(folder: Path) -> Mapping[str, Any]:
    config = autoencoder_config(folder / "config.json")
    class_name = config.get("_class_name")
    if class_name != "AutoencoderKL":
        raise UserError(
            f"{folder} is {f'a {class_name}' if class_name else 'no model of diffusers'}, wanted an AutoencoderKL"
        )
    if "block_out_channels" not in config:
        raise UserError(f"{folder / 'config.json'} is damaged: it has no block_out_channels")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UserError(f"{folder} normalises latents per channel (latents_mean, latents_std), which is not supported")
    return config


def autoencoder_config(path: Path) -> dict[str, Any]:
    """The config.json of an autoencoder. Raises UserError on invalid numbers in it."""
    config = read_json_object(path)
    scale, shift = config.get("scaling_factor", SCALE_OF_CLASS), config.get("shift_factor") or 0.0
    for name, value, least in (("scaling_factor", scale, 0.0), ("shift_factor", shift, -LARGEST_SCALE)):
        if type(value) not in (int, float) or not least < value < LARGEST_SCALE:
            between = f"a number above {least:g} and below {LARGEST_SCALE:g}"
            raise UserError(f"{path} is damaged: {name} is {str(value)[:40]}, wanted {between}")
    channels, blocks = config.get("latent_channels", 4), config.get("block_out_channels", [1])
    if type(channels) is not int or channels < 1:
        raise UserError(f"{path} is damaged: latent_channels is {str(channels)[:40]}, wanted a whole number from 1")
    if (
        not isinstance(blocks, list)
        or not 1 <= len(blocks) <= _LEVELS
        or any(type(b) is not int or b < 1 for b in blocks)
    ):
        raise UserError(f"{path} is damaged: block_out_channels is no list of 1 to {_LEVELS} whole numbers from 1")
    return config
