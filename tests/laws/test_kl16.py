"""KL-16: the published file in the class of diffusers, against the network written out from the published keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.models.autoencoder import KL16_CONFIG, kl16_to_diffusers, open_autoencoder

NARROW = (32, 32, 64, 64, 64)
WIDTHS = {"published": (128, 128, 256, 256, 512), "narrow": NARROW}


def published_shapes(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every key of the published file with its shape, for a network of these widths."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, side: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, side, side), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        block(f"{name}.mid.block_2", width, width)

    low = widths[-1]
    conv("encoder.conv_in", widths[0], 3, 3)
    into = widths[0]
    for level, width in enumerate(widths):
        for index in range(2):
            block(f"encoder.down.{level}.block.{index}", into, width)
            into = width
            if level == 4:
                attention(f"encoder.down.4.attn.{index}", width)
        if level < 4:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder", low)
    norm("encoder.norm_out", low)
    conv("encoder.conv_out", 32, low, 3)
    conv("decoder.conv_in", low, 16, 3)
    middle("decoder", low)
    into = low
    for level in reversed(range(5)):
        for index in range(3):
            block(f"decoder.up.{level}.block.{index}", into, widths[level])
            into = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", into, into, 3)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0], 3)
    conv("quant_conv", 32, 32, 1)
    conv("post_quant_conv", 16, 16, 1)
    return shapes


class WrittenOut:
    """The network straight from the published tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2).transpose(1, 2) for part in "qkv")
        mixed = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return x + self.conv(f"{name}.proj_out", mixed.transpose(1, 2).reshape(x.shape))

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.attention(f"{name}.mid.attn_1", self.block(f"{name}.mid.block_1", x))
        return self.block(f"{name}.mid.block_2", x)

    def moments(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in range(5):
            for index in range(2):
                x = self.block(f"encoder.down.{level}.block.{index}", x)
                if level == 4:
                    x = self.attention(f"encoder.down.4.attn.{index}", x)
            if level < 4:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", self.middle("encoder", x))), padding=1)
        mean, log_variance = self.conv("quant_conv", x).chunk(2, 1)
        return torch.cat([mean, log_variance.clamp(-30, 20)], 1)

    def decode(self, z: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for level in reversed(range(5)):
            for index in range(3):
                x = self.block(f"decoder.up.{level}.block.{index}", x)
            if level:
                doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", doubled, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A narrow network's tensors; the file is kl16.ckpt in `tmp_path`."""
    monkeypatch.setitem(KL16_CONFIG, "block_out_channels", NARROW)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.05 if len(shape) > 1 else 0.2) + ("norm" in name)
        for name, shape in published_shapes(NARROW).items()
    }
    torch.save({"model": tensors}, tmp_path / "kl16.ckpt")
    return tensors


def test_published_keys_and_shapes_become_those_of_diffusers() -> None:
    from diffusers import AutoencoderKL

    made: Any = AutoencoderKL
    shapes = published_shapes(WIDTHS["published"])
    with torch.device("meta"):
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        wanted = made(**KL16_CONFIG).state_dict()
    assert len(shapes) == 312 and sum(value.numel() for value in tensors.values()) == 66_456_019
    found = kl16_to_diffusers(tensors)
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in wanted.items()}


def test_it_computes_what_the_published_network_does(tmp_path: Path, narrow: dict[str, Tensor]) -> None:
    ours, theirs = open_autoencoder(str(tmp_path / "kl16.ckpt")), WrittenOut(narrow)
    assert (ours.scale, ours.shift, ours.channels, ours.factor) == (0.2325, 0.0, 16, 16)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 32, 64, generator=generator) * 2 - 1
    moments = ours.moments(pixels)
    assert moments.shape == (2, 32, 2, 4)
    torch.testing.assert_close(moments, theirs.moments(pixels), rtol=1e-4, atol=1e-4)
    latents = ours.latents(moments, torch.zeros(2, 16, 2, 4))
    torch.testing.assert_close(latents, 0.2325 * moments[:, :16])
    torch.testing.assert_close(ours.decode(latents), theirs.decode(moments[:, :16]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "nan", "level attention"])
def test_other_files_are_refused(tmp_path: Path, narrow: dict[str, Tensor], fault: str) -> None:
    if fault == "missing":
        del narrow["quant_conv.bias"]
    elif fault == "surplus":
        narrow["loss.logvar"] = torch.zeros(1)
    elif fault == "shape":
        narrow["decoder.conv_out.weight"] = torch.zeros(1, 32, 3, 3)
    elif fault == "nan":
        narrow["decoder.conv_out.bias"][0] = torch.nan
    else:  # latent diffusion's own kl-f16 has attention in its decoder
        narrow["decoder.up.4.attn.0.q.weight"] = torch.zeros(64, 64, 1, 1)
    torch.save({"model": narrow}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "other.ckpt"))):
        open_autoencoder(str(tmp_path / "other.ckpt"))
