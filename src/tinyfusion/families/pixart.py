"""PixArt-alpha: a text-conditioned diffusion transformer (Chen et al., arXiv 2310.00426), computed by the class of diffusers.

Classes are prompts: the model carries the encoded texts of its K classes, and of the null prompt as row K, as constants.
The process is DiT's: linear betas, noise prediction, learned variance. Shapes: B samples, C channels, S side, N tokens of a
text with E features each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError
from tinyfusion.families.dit.family import DIT
from tinyfusion.families.family import DiffusersFolder, ModelFamily
from tinyfusion.families.sizes import check_ranges, position_table

PROMPTS = "prompts.safetensors"  # beside the weights in a folder of diffusers, with these tensors
_TEXTS = ("captions", "caption_mask")
_UNUSED = ("net.pos_embed.pos_embed", "net.caption_projection.y_embedding")  # in some files: the formula, a null text
_SIZES = {"input_size": "sample_size", "depth": "num_layers", "num_heads": "num_attention_heads",
          **{name: name for name in ("patch_size", "in_channels", "caption_channels", "interpolation_scale")}}  # fmt: skip
UNFIT = {
    "official": "the published state dict has no prompts, and does not say its sizes",
    "diffusers": "its folder has no prompts; model.module.net.save_pretrained writes it without them",
}


@dataclass(frozen=True)
class PixArtArch:
    """Every size of a PixArt. input_size: side of the square input in the model's own space. num_classes: prompts, without
    the null prompt. Defaults are of the published text encoder, T5-XXL.
    """

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    caption_tokens: int = 120
    caption_channels: int = 4096
    interpolation_scale: float = 1.0  # by which positions are divided: 1 as trained; folders of 256 pixels may say 0.5

    def __post_init__(self) -> None:
        check_ranges(self, *(field.name for field in dataclasses.fields(self) if field.name != "interpolation_scale"))
        if not self.interpolation_scale > 0:
            raise ValueError(f"interpolation_scale must be above 0; got {self.interpolation_scale:g}")
        for name, divisor in (("hidden_size", self.num_heads), ("hidden_size", 4)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {divisor}")

    @property
    def rules(self) -> dict[str, float]:
        """What the model computes otherwise than as trained, with the same tensors: part of its hash."""
        return {} if self.interpolation_scale == 1 else {"interpolation_scale": self.interpolation_scale}

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return (self.input_size // self.patch_size) ** 2


class PixArt(nn.Module):
    """The whole model: x (B, C, S, S), t (B,) original steps, y (B,) in 0..K -> (B, 2C, S, S), noise and variance logits.

    Texts: captions (K + 1, N, E) and caption_mask (K + 1, N), 1 where there is a token and 0 where there is none.
    """

    captions: Tensor
    caption_mask: Tensor

    def __init__(self, arch: PixArtArch) -> None:
        super().__init__()
        from diffusers import PixArtTransformer2DModel  # late: seconds

        network: Any = PixArtTransformer2DModel  # untyped
        self.arch, self.net, rows = arch, network(**config_of_arch(arch)), arch.num_classes + 1
        table = position_table(arch.hidden_size, arch.input_size // arch.patch_size, arch.interpolation_scale)
        self.net.pos_embed.register_buffer("pos_embed", table, persistent=False)  # theirs is without values on meta
        self.register_buffer("captions", torch.zeros(rows, arch.caption_tokens, arch.caption_channels))
        self.register_buffer("caption_mask", torch.ones(rows, arch.caption_tokens))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        texts = {"encoder_hidden_states": self.captions[y], "encoder_attention_mask": self.caption_mask[y]}
        return self.net(x, timestep=t, **texts, return_dict=False)[0]


@torch.no_grad()
def initialise(model: PixArt, seed: int) -> None:
    """Fresh weights as published, but for the bias of the patches: Xavier-uniform linears, normal(0, 0.02) embedders, zero biases,
    cross-attention and output. Texts are normal(0, 1), another one per class, as without an encoder a class is but a name.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.net.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias") or name.startswith("proj_out") or ".attn2.to_out." in name:
            nn.init.zeros_(parameter)
        elif name.startswith(("adaln_single.", "caption_projection.")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=generator)
    model.captions.normal_(generator=generator)


def with_prompts(model: Any, captions: Tensor, mask: Tensor) -> Any:
    """The same `LoadedModel` with other classes: a new module, on the CPU; the number and length of the texts may change.

    captions (K + 1, N, E), the null prompt last; mask (K + 1, N), 1 where there is a token. Texts count in the hash, so they
    come before pruning. Raises UserError on shapes that do not fit and on a text without tokens.
    """
    wanted = f"captions (K + 1, tokens, {model.arch.caption_channels}) and a mask (K + 1, tokens), a token in every row"
    fits = captions.ndim == 3 and len(captions) > 1 and captions.shape[2] == model.arch.caption_channels
    if not fits or mask.shape != captions.shape[:2] or not bool(mask.bool().any(dim=1).all()):
        raise UserError(f"wanted {wanted}; got {tuple(captions.shape)} and {tuple(mask.shape)}")
    arch = dataclasses.replace(model.arch, num_classes=len(captions) - 1, caption_tokens=captions.shape[1])
    tensors = {**model.module.state_dict(), "captions": captions.float(), "caption_mask": mask.float()}
    return dataclasses.replace(model, arch=arch).with_weights(tensors)


def arch_of_state_dict(
    _tensors: Mapping[str, Tensor], _num_heads: int | None, _num_classes: int | None = None
) -> NoReturn:
    """Raises ValueError: the published state dict tells neither the side of its images nor its prompts."""
    raise ValueError(f"{UNFIT['official']}: give the folder of diffusers, which says its sizes")


def config_of_arch(arch: PixArtArch) -> dict[str, Any]:
    """What diffusers' class is built with: the sizes, and what every model here has."""
    sizes = {theirs: getattr(arch, ours) for ours, theirs in _SIZES.items()}
    width = dict(attention_head_dim=arch.hidden_size // arch.num_heads, cross_attention_dim=arch.hidden_size)
    same = dict(use_additional_conditions=False, activation_fn="gelu-approximate", norm_eps=1e-6,
                norm_type="ada_norm_single", norm_elementwise_affine=False, attention_bias=True, dropout=0.0)  # fmt: skip
    return {**sizes, **width, **same, "out_channels": 2 * arch.in_channels}


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json of diffusers is of this class, under its own name or, in folders of 2023, an older one."""
    return config["_class_name"] == "PixArtTransformer2DModel" or config.get("norm_type") == "ada_norm_single"


def from_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PixArtArch, dict[str, Tensor]]:
    """Sizes and state dict from the config.json of diffusers, its tensors and those of `prompts.safetensors`.

    Raises UserError where the model is another than ours or has no prompts, ValueError where sizes do not fit together.
    """
    texts = [tensors[name].shape for name in _TEXTS] if set(_TEXTS) <= set(tensors) else []
    said = {name: value for name, value in config.items() if value is not None}
    try:
        side = said.setdefault("sample_size", 128)  # what the class takes where nothing is said, here and below
        said = {"use_additional_conditions": side == 128, "interpolation_scale": max(side // 64, 1)} | said
        sizes = {name: said[theirs] for name, theirs in _SIZES.items()}
        heads, channels = sizes["num_heads"], said["attention_head_dim"]
        if type(heads) is not int or type(channels) is not int:
            raise ValueError(f"{heads!r} heads of {channels!r} channels are no whole numbers")
        sizes |= {"hidden_size": heads * channels}
        sizes["num_classes"] = texts[0][0] - 1 if texts else 1
        sizes["caption_tokens"] = texts[-1][-1] if texts else 1
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no sizes can be read: {error}") from error
    arch: PixArtArch = build_known(PixArtArch, sizes, "")
    wanted = config_of_arch(arch)
    if odd := [name for name, value in wanted.items() if said.get(name, value) != value]:
        raise UserError(f"has {odd[0]} {said[odd[0]]!r}; PixArts are opened with {wanted[odd[0]]!r}")
    if not texts:
        raise UserError(
            f"has no prompts: wanted a file {PROMPTS} in its folder, with the encoded texts captions (K + 1, tokens, "
            f"{arch.caption_channels}), the null prompt last, and caption_mask (K + 1, tokens), 1 where there is a token"
        )
    ours = {name if name in _TEXTS else f"net.{name}": tensor for name, tensor in tensors.items()}
    return arch, {name: tensor for name, tensor in ours.items() if name not in _UNUSED}


PIXART = ModelFamily(
    name="pixart",
    title="text-conditioned diffusion transformer (PixArt-alpha)",
    process="gaussian",
    arch_type=PixArtArch,
    build=PixArt,
    initialise=initialise,
    arch_of_state_dict=arch_of_state_dict,
    block_lists={"net.transformer_blocks": "depth"},
    mark="t_block.1.weight",
    published_latent=DIT.published_latent,
    published_license="OpenRAIL++",
    unfit_formats=lambda _arch, _tensors: dict(UNFIT),
    diffusers=DiffusersFolder(("PixArtTransformer2DModel",), is_config, from_diffusers, PROMPTS),
)
