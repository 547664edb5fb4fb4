"""The diffusion head of MAR: a small residual MLP that denoises one token, given what the decoder says of it.

Source: Li et al., arXiv 2406.11838, section 3.3; official state-dict keys (`diffloss.net.*`).
Shapes: "..." any leading dimensions (images, tokens, noise levels), C values of a token, D width of the decoder, W width
of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfusion.families.dit.model import TimestepEmbedder
from tinyfusion.families.mar.block import NORM_EPS


@dataclass(frozen=True)
class HeadSizes:
    """token_features: C. condition_features: D. depth: residual layers. width: W."""

    token_features: int
    condition_features: int
    depth: int
    width: int


class ResidualLayer(nn.Module):
    """Two linear layers on a modulated norm: x (..., W), c (..., W) -> (..., W). Its own norm has weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), 1 + scale)))


class HeadOutput(nn.Module):
    """Modulated norm, without weights of its own, and projection: (..., W) -> (..., 2C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class DiffusionHead(nn.Module):
    """Noisy token, timestep and condition to noise prediction (C) and variance logits (C)."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(sizes.width)
        self.cond_embed = nn.Linear(sizes.condition_features, sizes.width)
        self.input_proj = nn.Linear(sizes.token_features, sizes.width)
        self.res_blocks = nn.ModuleList([ResidualLayer(sizes.width) for _ in range(sizes.depth)])
        self.final_layer = HeadOutput(sizes.width, 2 * sizes.token_features)

    def conditions(self, z: Tensor) -> Tensor:
        """z (..., D) of tokens -> (..., W). It does not depend on the timestep: taken once, used at every one."""
        out: Tensor = self.cond_embed(z)
        return out

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (..., C) noised tokens, t original steps 0..999, condition (..., W), both broadcast over x -> (..., 2C)."""
        c = self.time_embed(t.reshape(-1)).unflatten(0, t.shape) + condition
        x = self.input_proj(x)
        for layer in self.res_blocks:
            x = layer(x, c)
        out: Tensor = self.final_layer(x, c)
        return out


@torch.no_grad()
def initialise_head(head: DiffusionHead, generator: torch.Generator) -> None:
    """Fresh weights as published: the output is 0, so the first loss is that of predicting no noise."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    for name, parameter in head.named_parameters():
        if name.startswith("time_embed") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
