"""The autoencoder between pictures and latents: any `AutoencoderKL` of diffusers, from a folder or by its hub id, or KL-16."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.families.tensor_checks import check_finite, check_sizes
from tinyfusion.models import kl16
from tinyfusion.models.hub import DIFFUSERS_WEIGHTS, autoencoder_folder
from tinyfusion.models.tensors import read_folder_weights

SCALE_OF_CLASS = 0.18215  # of AutoencoderKL, where its configuration says nothing
LARGEST_SCALE = 1e6  # of latents; far beyond every published one
_LEVELS = 16  # of an autoencoder at most, each of which halves the side
_SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "in_channels", "out_channels", "norm_num_groups",
          "down_block_types", "up_block_types")  # fmt: skip


@dataclass(frozen=True)
class Autoencoder:
    """A frozen `AutoencoderKL` in float32.

    Models see (z - shift) x scale of its latents z. channels: of a latent; factor: pixels per latent cell and side.
    name: as it was given.
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
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def open_autoencoder(name: str) -> Autoencoder:
    """The autoencoder of a folder or hub id, alone or as the `vae` of a pipeline; or KL-16, of its file or by its known name.

    Raises UserError where there is none, where it is of another class, and where its weights are missing, damaged or not
    finite.
    """
    if (file := kl16.kl16_file(name)) is not None:
        return Autoencoder(kl16.open_kl16(file), name, kl16.SCALE, 0.0, kl16.CHANNELS, kl16.FACTOR)
    folder = autoencoder_folder(name)
    config = _config(folder)
    tensors, _ = read_folder_weights(folder, DIFFUSERS_WEIGHTS)
    check_sizes({size: config[size] for size in _SIZES if size in config}, tensors, str(folder / "config.json"))
    check_finite(tensors, f"the weights in {folder} are damaged")
    del tensors
    try:
        with quiet_logs():
            from diffusers import AutoencoderKL  # late: seconds

            load: Any = AutoencoderKL.from_pretrained
            module, report = load(str(folder), output_loading_info=True, torch_dtype=torch.float32)
    except Exception as error:  # diffusers, safetensors, pickle and json, each in their words
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder} cannot be opened as an AutoencoderKL: {reason}") from error
    check_loaded(report, folder)
    module.eval().requires_grad_(False)
    scale, shift = config.get("scaling_factor", SCALE_OF_CLASS), config.get("shift_factor") or 0.0
    channels, factor = config.get("latent_channels", 4), 2 ** (len(config["block_out_channels"]) - 1)
    return Autoencoder(module, name, float(scale), float(shift), int(channels), factor)


def check_loaded(report: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError unless `report`, of `from_pretrained`, lists no missing, unexpected or misshapen tensor."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if odd := [str(key) for key in report.get(what) or ()]:
            raise UserError(
                f"the weights in {folder} do not go with its config.json: {what} {', '.join(sorted(odd)[:3])}"
            )


@contextmanager
def quiet_logs() -> Iterator[None]:
    """No log lines of other libraries: what goes wrong comes as an exception, and the rest is not for our users."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _config(folder: Path) -> Mapping[str, Any]:
    """Its config.json, of a kind that we know how to use."""
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
    """The config.json of an autoencoder. Raises UserError where numbers that are read from it are none."""
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
