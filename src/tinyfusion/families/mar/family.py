"""The family entry of MAR, the masked autoregressive model."""

from __future__ import annotations

from tinyfusion.families.family import ModelFamily
from tinyfusion.families.mar.model import (
    Mar,
    MarArch,
    arch_of_state_dict,
    example_inputs,
    initialise,
    stages,
    undecayed,
    unfit_formats,
)

MAR = ModelFamily(
    name="mar",
    title="masked autoregressive model (MAR)",
    process="masked",
    arch_type=MarArch,
    build=Mar,
    initialise=initialise,
    arch_of_state_dict=arch_of_state_dict,
    example=example_inputs,
    block_lists={"encoder_blocks": "encoder_depth", "decoder_blocks": "decoder_depth"},
    mlp_norm="norm2",
    mark="z_proj.weight",
    published_latent={16: {"latent_scale": 0.2325, "vae": "mar-kl16", "pixels_per_latent": 16}},
    published_license="MIT",
    unfit_formats=unfit_formats,
    undecayed=undecayed,
    stages=stages,
)
