"""The family entry of DiT, and how its folders of diffusers are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.families.dit import diffusers
from tinyfusion.families.dit.dynamic import DIT_DYNAMIC
from tinyfusion.families.dit.model import DiT, DiTArch, arch_of_state_dict, initialise
from tinyfusion.families.dit.width import DIT_WIDTHS, unfit_formats
from tinyfusion.families.family import DiffusersFolder, ModelFamily
from tinyfusion.families.sizes import position_table
from tinyfusion.families.tensor_checks import check_sizes, check_tensors


def read_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[DiTArch, dict[str, Tensor]]:
    """Sizes and state dict from the config.json of `DiTTransformer2DModel` and its tensors.

    Raises UserError on another model than a DiT, and on tensors that are not exactly those of the sizes; ValueError on sizes that
    do not fit together.
    """
    arch = diffusers.arch_of_config(config)
    check_sizes(dataclasses.asdict(arch), tensors, "config.json")
    if diffusers.wrong_table(tensors, arch):
        raise UserError("holds a position table that is not the formula's, and diffusers takes none but that")
    stored = {name: tensor for name, tensor in tensors.items() if name != diffusers.POSITION_BUFFER}
    wanted = diffusers.to_diffusers(DIT.shapes(arch), arch.depth)
    check_tensors(stored, wanted, "does not hold this model")
    return arch, diffusers.from_diffusers(stored, arch)


DIT = ModelFamily(
    name="dit",
    title="diffusion transformer (DiT)",
    process="gaussian",
    arch_type=DiTArch,
    build=DiT,
    initialise=initialise,
    arch_of_state_dict=arch_of_state_dict,
    block_lists={"blocks": "depth"},
    mlp_norm="norm2",
    mark="x_embedder.proj.weight",
    guided_channels=diffusers.GUIDED_CHANNELS,
    computed={"pos_embed": lambda arch: position_table(arch.hidden_size, arch.input_size // arch.patch_size)},
    published_latent={4: {"latent_scale": 0.18215, "vae": "stabilityai/sd-vae-ft-ema", "pixels_per_latent": 8}},
    published_license="CC-BY-NC-4.0",
    widths=DIT_WIDTHS,
    dynamic=DIT_DYNAMIC,
    unfit_formats=unfit_formats,
    differences=diffusers.differences,
    arch_for=diffusers.ARCH_FOR,
    diffusers=DiffusersFolder((diffusers.CLASS_NAME,), diffusers.is_config, read_diffusers, export=diffusers.EXPORT),
)
