"""SiT: the network of DiT, trained as a flow (Ma et al., arXiv 2401.08740). Modules, initial values and keys are DiT's.

Two things differ. Time is a real number in [0, 1], 0 at pure noise and 1 at the data, and goes into the embedder as it is,
never multiplied by 1000. And there is no variance: published weights have 2C output channels all the same, of which the
second half is dropped. Keys and shapes of a SiT and a DiT are equal, so a file of tensors cannot say which one it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from tinyfusion.families.dit import width as dit_width
from tinyfusion.families.dit.family import DIT
from tinyfusion.families.dit.model import DiT, DiTArch


class SiT(DiT):
    """The whole model: x (B, C, H, W), t (B,) in [0, 1], y (B,) labels in 0..K -> (B, C, H, W).

    `learn_sigma` says whether the last layer has the second half of the channels, which is never looked at and gets no
    gradient.
    """

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, : self.arch.in_channels]


def unfit_formats(arch: DiTArch, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Formats of others that cannot hold a SiT, with the reason: diffusers never, the official state dict as for a DiT."""
    reasons = dit_width.unfit_formats(arch, tensors)
    reasons["diffusers"] = "it is a SiT, for which diffusers has no class: its DiT would sample it as a diffusion model"
    return reasons


SIT = dataclasses.replace(
    DIT,
    name="sit",
    title="scalable interpolant transformer (SiT)",
    process="flow",
    build=SiT,
    published_license="MIT",
    unfit_formats=unfit_formats,
    diffusers=None,
)
