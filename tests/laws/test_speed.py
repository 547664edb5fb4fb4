"""Counted work against the published number."""

from __future__ import annotations

import torch

from tinyfusion.families.dit.model import published_arch
from tinyfusion.families.registry import FAMILIES
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.facts import ModelFacts


def test_dit_xl_2_at_256_pixels_takes_118_69_g() -> None:
    """The published 118.69 G to the last multiply-accumulate; nothing of the 675 M parameters is allocated."""
    family, arch = FAMILIES["dit"], published_arch("DiT-XL/2", 256)
    with torch.device("meta"):
        model = LoadedModel(family.build(arch), family, arch, ModelFacts(image_size=256))
    assert model.macs() == 118_688_661_504
