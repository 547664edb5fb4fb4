"""PixArt-alpha: a text-conditioned diffusion transformer (Chen et al., arXiv 2310.00426), computed by the class of diffusers.

Labels are prompts, encoded outside of the model: a table of its data, or one of its own in its file, next to the weights.
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

from tinyfusion.conditioning.condition import Condition
from tinyfusion.conditioning.texts import EMBEDDINGS, MASK, NAMES, text_table
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.rng import Randomness
from tinyfusion.families.dit.family import DIT
from tinyfusion.families.family import DiffusersFolder, ModelFamily, TextRules
from tinyfusion.families.sizes import check_ranges, position_table

CLASS_NAME = "PixArtTransformer2DModel"
PROMPTS = "prompts.safetensors"  # next to the weights in a folder of diffusers: texts of the model's own
_IN_FILES = {EMBEDDINGS: "captions", MASK: "caption_mask"}
_TOKENS = 120  # of a published text
_UNUSED = ("net.pos_embed.pos_embed", "net.caption_projection.y_embedding")  # in some files: the formula, a null text
_SIZES = {"input_size": "sample_size", "depth": "num_layers", "num_heads": "num_attention_heads",
          **{name: name for name in ("patch_size", "in_channels", "caption_channels", "interpolation_scale")}}  # fmt: skip
UNFIT = {
    "official": "the published state dict has no prompts, and does not say its sizes",
    "diffusers": "its folder has no prompts; model.module.net.save_pretrained writes it without them",
}


@dataclass(frozen=True)
class PixArtArch:
    """Every size of a PixArt. input_size: side of the square input in the model's own space. num_classes: prompts of its own,
    without the null prompt, each of caption_tokens places; 0 where all come from data. Defaults are of the published text
    encoder, T5-XXL.
    """

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int = 0
    caption_tokens: int = _TOKENS
    caption_channels: int = 4096
    interpolation_scale: float = 1.0  # by which positions are divided: 1 as trained; folders of 256 pixels may say 0.5

    def __post_init__(self) -> None:
        own = {"num_classes", "caption_tokens"} if self.num_classes == 0 else set()
        others = {field.name for field in dataclasses.fields(self)} - {"interpolation_scale"}
        check_ranges(self, *sorted(others - own))
        if own:
            object.__setattr__(self, "caption_tokens", 0)
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
    """The whole model: x (B, C, S, S), t (B,) original steps, texts -> (B, 2C, S, S), noise and variance logits.

    embeddings (B, N, E) of any floating-point type; mask (B, N), 1 where there is a token, or None where every place is one.
    """

    def __init__(self, arch: PixArtArch) -> None:
        super().__init__()
        from diffusers import PixArtTransformer2DModel  # late: seconds

        network: Any = PixArtTransformer2DModel  # untyped
        self.arch, self.net = arch, network(**config_of_arch(arch))
        table = position_table(arch.hidden_size, arch.input_size // arch.patch_size, arch.interpolation_scale)
        self.net.pos_embed.register_buffer("pos_embed", table, persistent=False)  # theirs is without values on meta

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        texts = {"encoder_hidden_states": embeddings.to(x.dtype), "encoder_attention_mask": mask}
        return self.net(x, timestep=t, **texts, return_dict=False)[0]


def text_inputs(condition: Condition) -> dict[str, Any]:
    """The arguments of a PixArt: embeddings and mask of the texts."""
    return {"embeddings": condition[EMBEDDINGS], "mask": condition.tensors.get(MASK)}


def example(arch: PixArtArch, num: int) -> tuple[Tensor, ...]:
    """Inputs of one forward pass of `num` samples, on the default device."""
    x = torch.zeros(num, arch.in_channels, arch.input_size, arch.input_size)
    texts = torch.zeros(num, arch.caption_tokens or _TOKENS, arch.caption_channels)
    return x, torch.zeros(num, dtype=torch.int64), texts, torch.ones(texts.shape[:2])


@torch.no_grad()
def initialise(model: PixArt, seed: int) -> None:
    """Fresh weights as published, but for the bias of the patches: Xavier-uniform linears, normal(0, 0.02) embedders, zero biases,
    cross-attention and output.
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


def own_texts(arch: PixArtArch, seed: int) -> Condition | None:
    """Texts of a new model, normal(0, 1), another one per class: without an encoder a class is but a name. None without classes."""
    if not arch.num_classes:
        return None
    generator = torch.Generator().manual_seed(Randomness(seed).generator_seed("texts"))
    captions = torch.randn(arch.num_classes + 1, arch.caption_tokens, arch.caption_channels, generator=generator)
    return text_table({EMBEDDINGS: captions, MASK: torch.ones(captions.shape[:2])})


def shapes_of_texts(arch: PixArtArch) -> dict[str, tuple[int, ...]]:
    """Shapes of the texts in a model file, the null prompt last; {} where it holds none."""
    rows = (arch.num_classes + 1, arch.caption_tokens)
    return {"captions": (*rows, arch.caption_channels), "caption_mask": rows} if arch.num_classes else {}


def check_texts(arch: PixArtArch, table: Condition) -> None:
    """Raises ValueError on texts of another encoder."""
    embeddings = table.tensors.get(EMBEDDINGS)
    if embeddings is None or embeddings.ndim != 3 or embeddings.shape[2] != arch.caption_channels:
        shapes = {name: tuple(tensor.shape) for name, tensor in table.tensors.items()}
        raise ValueError(f"the model takes texts with embeddings (K, tokens, {arch.caption_channels}); got {shapes}")


def with_prompts(model: Any, captions: Tensor, mask: Tensor) -> Any:
    """The same `LoadedModel` with texts of its own, which its file will hold; their number and length may change.

    captions (K + 1, N, E), the null prompt last; mask (K + 1, N), 1 where there is a token. These texts count in the hash, so
    they come before pruning. Raises UserError on shapes that do not fit and on a text without tokens.
    """
    try:
        texts = text_table({EMBEDDINGS: captions.float(), MASK: mask.float()})
        check_texts(model.arch, texts)
    except ValueError as error:
        raise UserError(f"{error}; a mask is (K + 1, tokens)") from error
    arch = dataclasses.replace(model.arch, num_classes=len(texts), caption_tokens=captions.shape[1])
    return dataclasses.replace(model, arch=arch, texts=texts)


def arch_of_state_dict(
    _tensors: Mapping[str, Tensor], _num_heads: int | None, _num_classes: int | None = None
) -> NoReturn:
    """Raises ValueError: the published state dict has neither the side of its images nor its prompts."""
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
    kind = config.get("_class_name")
    return kind == CLASS_NAME or (kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single")


def from_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PixArtArch, dict[str, Tensor]]:
    """Sizes and state dict from the config.json of diffusers, its tensors and those of `prompts.safetensors`.

    Raises UserError where the model is another than ours, ValueError where sizes do not fit together.
    """
    listed = {name: tensor for name, tensor in tensors.items() if name in NAMES}
    with prefixed("has prompts that cannot be read", ValueError):
        table = text_table(listed) if listed else None
    said = {name: value for name, value in config.items() if value is not None}
    try:
        side = said.setdefault("sample_size", 128)  # what the class takes where nothing is said, here and below
        said = {"use_additional_conditions": side == 128, "interpolation_scale": max(side // 64, 1)} | said
        sizes = {name: said[theirs] for name, theirs in _SIZES.items()}
        heads, channels = sizes["num_heads"], said["attention_head_dim"]
        if type(heads) is not int or type(channels) is not int:
            raise ValueError(f"{heads!r} heads of {channels!r} channels are no whole numbers")
        sizes |= {"hidden_size": heads * channels}
        sizes["num_classes"] = len(table) if table else 0
        sizes["caption_tokens"] = table[EMBEDDINGS].shape[1] if table else 0
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no sizes can be read: {error}") from error
    arch: PixArtArch = build_known(PixArtArch, sizes, "")
    wanted = config_of_arch(arch)
    if odd := [name for name, value in wanted.items() if said.get(name, value) != value]:
        raise UserError(f"has {odd[0]} {said[odd[0]]!r}; PixArts are opened with {wanted[odd[0]]!r}")
    ours = {f"net.{name}": tensor for name, tensor in tensors.items() if name not in NAMES}
    ours = {name: tensor for name, tensor in ours.items() if name not in _UNUSED}
    if table is not None and table.null_row is not None:
        mask = torch.ones(len(table) + 1, arch.caption_tokens)
        if MASK in table.tensors:
            mask = torch.cat([table[MASK], table.null_row[MASK]]).float()
        ours |= {"captions": torch.cat([table[EMBEDDINGS], table.null_row[EMBEDDINGS]]), "caption_mask": mask}
    return arch, ours


PIXART = ModelFamily(
    name="pixart",
    title="text-conditioned diffusion transformer (PixArt-alpha)",
    process="gaussian",
    arch_type=PixArtArch,
    build=PixArt,
    initialise=initialise,
    arch_of_state_dict=arch_of_state_dict,
    example=example,
    block_lists={"net.transformer_blocks": "depth"},
    mlp_norm="norm2",
    mark="t_block.1.weight",
    published_latent=DIT.published_latent,
    published_license="OpenRAIL++",
    unfit_formats=lambda _arch, _tensors: dict(UNFIT),
    inputs=text_inputs,
    texts=TextRules(_IN_FILES, shapes_of_texts, check_texts, own_texts),
    diffusers=DiffusersFolder((CLASS_NAME,), is_config, from_diffusers, PROMPTS),
)
