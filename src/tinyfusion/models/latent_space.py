"""The autoencoder of a pipeline of diffusers, any class: pixels of images or videos to latents as its transformer sees them.

What a transformer sees of a latent z is ((z - shift_factor) - mean) x scaling_factor / std. Factors come from the autoencoder's
config.json, mean and std per channel from there (latents_mean, latents_std), from buffers of that name, or from the running
statistics of a batch norm `bn`, which are of latents whose 2 x 2 cells are stacked to channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import explained, read_json_object
from tinyfusion.families.tensor_checks import check_finite
from tinyfusion.models.autoencoder import autoencoder_config, check_loaded, hash_of, quiet_logs

VAE = "vae"  # the component of a pipeline
_PROBE = 64  # side of the picture by which sizes of latents are found
_RATIOS = ("temporal_compression_ratio", "scale_factor_temporal")  # names of frames per latent frame
_EPS = 1e-4  # of a batch norm whose config names none


@dataclass(frozen=True)
class LatentSpace:
    """A frozen autoencoder in float32.

    factor: pixels per latent cell and side. scale, shift: transformers see (z - shift) x scale; 1 and 0 where `normal`, mean and
    std per channel (C,), is applied to what is stored. patched: 2 x 2 cells are stacked to channels. deep: the module takes
    videos (N, 3, F, H, W). video: its pipeline does. exact: it has no posterior, but one latent per picture.
    """

    module: nn.Module
    name: str
    channels: int
    factor: int
    scale: float
    shift: float
    normal: tuple[Tensor, Tensor] | None
    patched: bool
    deep: bool
    video: bool
    exact: bool

    def moments(self, pixels: Tensor) -> Tensor:
        """(N, 2 C, h, w) float32, of videos (N, 2 C, F, h, w): mean and log-variance of the posterior of pixels in [-1, 1].

        pixels: (N, 3, H, W), or (N, 3, F, H, W). Normalised per channel where the autoencoder is. Without a posterior (N, C, ...).
        """
        with torch.inference_mode():
            moments = self._encoded(pixels).float()
        if self.deep and not self.video:
            moments = moments.squeeze(2)
        mean, *log_variance = moments.chunk(1 if self.exact else 2, dim=1)
        fields = [mean, *log_variance]
        if self.patched:
            fields = [nn.functional.pixel_unshuffle(each, 2) for each in fields]
        if self.normal is not None:
            centre, deviation = (each.view(-1, *[1] * (mean.ndim - 2)).to(mean) for each in self.normal)
            fields[0] = (fields[0] - centre) / deviation
            fields[1:] = [each - 2 * torch.log(deviation) for each in fields[1:]]
        return torch.cat(fields, 1)

    def _encoded(self, pixels: Tensor) -> Tensor:
        """The module's answer: mean and log-variance along axis 1, or latents."""
        flat = pixels.ndim == 5 and not self.deep  # frame by frame
        if self.deep and pixels.ndim == 4:
            pixels = pixels.unsqueeze(2)
        answer = self.module.encode(pixels.transpose(1, 2).flatten(0, 1) if flat else pixels)  # type: ignore[operator]
        posterior = getattr(answer, "latent_dist", None)
        if posterior is None:
            values = answer.latent if hasattr(answer, "latent") else answer.latents
        else:
            values = posterior.mode() if self.exact else torch.cat([posterior.mean, posterior.logvar], 1)
        return values.unflatten(0, (len(pixels), -1)).transpose(1, 2) if flat else values

    def latents(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Latents as transformers see them of moments as above: a sample by standard normal noise (N, C, ...); None: the mean."""
        mean, *log_variance = moments.chunk(1 if self.exact else 2, dim=1)
        if noise is not None and log_variance:
            mean = mean + torch.exp(0.5 * log_variance[0]) * noise
        return (mean - self.shift) * self.scale

    def shape(self, height: int, width: int, frames: int) -> tuple[int, ...]:
        """(C, h, w), or (C, F, h, w), of latents of these pixels. Raises UserError on frames that it cannot encode alike."""
        cells = (self.channels, height // self.factor, width // self.factor)
        if not self.video:
            return cells
        ratio = next((int(value) for name in _RATIOS if (value := self._fact(name))), 1) if self.deep else 1
        if (frames - 1) % ratio:
            below = frames - 1 - (frames - 1) % ratio + 1
            raise UserError(
                f"{self.name} encodes 1 + {ratio} n frames; got encode.frames={frames}: take {below} or {below + ratio}"
            )
        return cells[0], 1 + (frames - 1) // ratio, *cells[1:]

    def _fact(self, name: str) -> Any:
        return vars(self.module).get(name) or getattr(self.module, "config", {}).get(name)

    def hash(self) -> str:
        """As of `Autoencoder`."""
        return hash_of(self.module)


def open_latent_space(pipeline: Path, name: str, class_name: str, video: bool) -> LatentSpace:
    """The autoencoder of a pipeline folder, on the CPU. name: of the pipeline, as given; class_name: that of the model index.

    Raises UserError where diffusers has no such class, and where weights are missing, damaged or not finite, or do not encode RGB.
    """
    import diffusers  # late: seconds

    folder = pipeline / VAE
    config = {**read_json_object(folder / "config.json")}
    known = getattr(diffusers, class_name, None)
    if not isinstance(known, type) or not issubclass(known, nn.Module) or not hasattr(known, "encode"):
        raise UserError(f"diffusers {diffusers.__version__} has no autoencoder {class_name}, which {pipeline} names")
    if "block_out_channels" in config:
        autoencoder_config(folder / "config.json")
    # of diffusers, safetensors, pickle or json
    with explained(f"{folder} cannot be opened as {class_name}", Exception), quiet_logs():
        load: Any = known.from_pretrained  # type: ignore[attr-defined]
        module, report = load(str(folder), output_loading_info=True, torch_dtype=torch.float32, local_files_only=True)
    check_loaded(report, folder)
    check_finite(module.state_dict(), f"the weights in {folder} are damaged")
    module.eval().requires_grad_(False)
    return _probed(module, name, folder, config, video)


def _probed(module: nn.Module, name: str, folder: Path, config: Mapping[str, Any], video: bool) -> LatentSpace:
    """The latent space of a module: its normalisation, and its sizes by the latents of one small picture."""
    deep = any(tensor.ndim == 5 for tensor in module.parameters())
    patched = isinstance(getattr(module, "bn", None), nn.BatchNorm2d)
    picture = torch.zeros(1, 3, 1, _PROBE, _PROBE) if deep else torch.zeros(1, 3, _PROBE, _PROBE)
    try:
        with torch.inference_mode():
            answer = module.encode(picture)  # type: ignore[operator]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} does not encode RGB pictures of {_PROBE} x {_PROBE}: {reason}") from error
    posterior = getattr(answer, "latent_dist", None)
    exact = posterior is None or not hasattr(posterior, "logvar")
    latent = posterior.mode() if posterior is not None else getattr(answer, "latent", None)
    latent = answer.latents if latent is None else latent
    factor = _PROBE // latent.shape[-1] * (2 if patched else 1)
    channels = latent.shape[1] * (4 if patched else 1)
    scale, shift = _factor(config, "scaling_factor", 1.0, folder), _factor(config, "shift_factor", 0.0, folder)
    normal = _normal(module, config, channels, scale, shift, folder)
    scale, shift = (scale, shift) if normal is None else (1.0, 0.0)
    return LatentSpace(module, name, channels, factor, scale, shift, normal, patched, deep, video, exact)


def _factor(config: Mapping[str, Any], name: str, default: float, folder: Path) -> float:
    value = config.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value) or (name == "scaling_factor" and value <= 0):
        raise UserError(f"{folder / 'config.json'} is damaged: {name} is {str(value)[:40]}, wanted a number")
    return float(value)


def _normal(
    module: nn.Module, config: Mapping[str, Any], channels: int, scale: float, shift: float, folder: Path
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of latents per channel, with the factors in them; None where there are factors alone."""
    norm = getattr(module, "bn", None)
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None and norm.running_var is not None
        eps = _factor(config, "batch_norm_eps", _EPS, folder)
        mean, std = norm.running_mean.clone(), torch.sqrt(norm.running_var + eps)
    else:
        buffers, names = dict(module.named_buffers()), ("latents_mean", "latents_std")
        values: list[Any] = [buffers.get(name, config.get(name)) for name in names]
        if values[0] is None and values[1] is None:
            return None
        try:
            mean, std = (torch.as_tensor(value, dtype=torch.float32) for value in values)
        except (TypeError, ValueError, RuntimeError) as error:
            wanted = f"{channels} numbers each"
            raise UserError(
                f"{folder / 'config.json'}: latents_mean and latents_std are {wanted}; got others"
            ) from error
    if mean.shape != (channels,) or std.shape != (channels,) or not bool((std > 0).all() & torch.isfinite(mean).all()):
        shapes = f"{tuple(mean.shape)} and {tuple(std.shape)}"
        raise UserError(
            f"{folder} normalises latents by mean and deviation of {shapes}: wanted one number of each of {channels} channels"
        )
    return mean + shift, std / scale
