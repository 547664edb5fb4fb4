"""DiT: the diffusion transformer with adaLN-Zero blocks (Peebles & Xie, arXiv 2212.09748), official state-dict keys.

Shapes: B samples, C channels, H = W = input side, p patch side, G = H / p, T = G * G tokens, D width, L depth, K classes.
The model has no randomness of its own: labels are dropped (replaced by the null class K) by its caller, so that a
teacher and its student always agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.blocks.packed import gelu_linear
from tinyfusion.families.sizes import check_ranges, list_length, position_table

TIMESTEP_FREQUENCIES = 256  # width of the sinusoidal timestep features, fixed by the published model
MLP_RATIO = 4


@dataclass(frozen=True)
class DiTArch:
    """Every size of a DiT.

    head_dim, mlp_hidden: width of one head and of the hidden layer of an MLP, None where they are the published
    hidden_size / num_heads and 4 hidden_size; a given value that equals those becomes None, so that one model has one arch.
    frequency_shift, mlp_norm_eps: where the class of diffusers computes something else than the published model, whose
    values are the defaults; see `families/dit/diffusers.py`.
    """

    input_size: int  # side of the square input in the model's own space (latent or pixel)
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int  # without the null class
    learn_sigma: bool = True  # output 2C channels: noise and variance logits
    head_dim: int | None = None
    mlp_hidden: int | None = None
    frequency_shift: int = 0  # timestep frequencies are 10000^(-i / (128 - shift))
    mlp_norm_eps: float = 1e-6  # of the norm before an MLP
    null_class: bool = True  # whether the label table has a row for no label, behind those of the classes

    def __post_init__(self) -> None:
        check_ranges(self, "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes",
                     "head_dim", "mlp_hidden")  # fmt: skip
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (the position table needs it)")
        if not 0 <= self.frequency_shift < TIMESTEP_FREQUENCIES // 2:
            raise ValueError(f"frequency_shift must be at least 0 and below 128; got {self.frequency_shift}")
        if not 0 < self.mlp_norm_eps < 1:
            raise ValueError(f"mlp_norm_eps must be above 0 and below 1; got {self.mlp_norm_eps}")
        if self.head_dim is not None and self.head_dim * self.num_heads == self.hidden_size:
            object.__setattr__(self, "head_dim", None)
        if self.mlp_hidden == MLP_RATIO * self.hidden_size:
            object.__setattr__(self, "mlp_hidden", None)

    @property
    def rules(self) -> dict[str, int | float]:
        """What is computed otherwise than published with the same tensors; a part of the hash."""
        published = {"frequency_shift": 0, "mlp_norm_eps": 1e-6, "null_class": True}
        return {name: getattr(self, name) for name, value in published.items() if getattr(self, name) != value}

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        """Channels of the hidden layer of an MLP."""
        return MLP_RATIO * self.hidden_size if self.mlp_hidden is None else self.mlp_hidden

    @property
    def out_channels(self) -> int:
        """2C with learned variance, else C."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def num_tokens(self) -> int:
        """T, tokens of one image."""
        return (self.input_size // self.patch_size) ** 2


# name -> (depth, hidden_size, num_heads); Source: arXiv 2212.09748 table 1, arXiv 2412.01199 (D19, D14, D7).
SIZES: dict[str, tuple[int, int, int]] = {
    "DiT-XL": (28, 1152, 16),
    "DiT-L": (24, 1024, 16),
    "DiT-B": (12, 768, 12),
    "DiT-S": (12, 384, 6),
    "DiT-D19": (19, 1152, 16),
    "DiT-D14": (14, 1152, 16),
    "DiT-D7": (7, 1152, 16),
}
HEADS_BY_WIDTH = {width: heads for _, width, heads in SIZES.values()}


def published_arch(name: str, image_size: int = 256, num_classes: int = 1000) -> DiTArch:
    """The published model `NAME/PATCH`, e.g. "DiT-XL/2", on latents of images `image_size` pixels wide.

    Raises ValueError on an unknown name.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"unknown model {name!r}; sizes are {', '.join(SIZES)}, written with a patch size as in DiT-XL/2"
        )
    depth, width, heads = SIZES[size]
    return DiTArch(image_size // 8, int(patch), 4, width, depth, heads, num_classes)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, D): x * (1 + scale) + shift."""
    return torch.addcmul(shift.unsqueeze(1), x, (1 + scale).unsqueeze(1))


class Attention(nn.Module):
    """Multi-head self-attention, one fused projection, no masks."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * num_heads * head_width)
        self.proj = nn.Linear(num_heads * head_width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_linear(self.fc1, x, "tanh"))


class DiTBlock(nn.Module):
    """adaLN-Zero block: x (B, T, D), c (B, D) -> (B, T, D)."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        width = arch.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, arch.num_heads, arch.head_width)
        self.norm2 = nn.LayerNorm(width, eps=arch.mlp_norm_eps, elementwise_affine=False)
        self.mlp = Mlp(width, arch.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate_msa.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_msa, scale_msa)))
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, T, D) -> (B, T, p * p * C_out)."""

    def __init__(self, width: int, patch_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def timestep_features(t: Tensor, shift: int = 0) -> Tensor:
    """t (B,), the original step 0..999, unscaled -> (B, 256) float32: [cos(t w) | sin(t w)], w_i = 10000^(-i/(128-shift))."""
    half = TIMESTEP_FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * steps / (half - shift))
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D)."""

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        held_in = next(self.mlp.parameters()).dtype  # a model in half precision has exact angles all the same
        return self.mlp(timestep_features(t, self.frequency_shift).to(held_in))


class LabelEmbedder(nn.Module):
    """y (B,) in 0..K, K the null class where there is one -> (B, D)."""

    def __init__(self, num_classes: int, width: int, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbedder(nn.Module):
    """(B, C, H, W) -> (B, T, D), tokens in row-major order."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens.contiguous()  # the stream keeps its layout through all blocks, and this one is quicker


class DiT(nn.Module):
    """The whole model: x (B, C, H, W), t (B,) original steps, y (B,) labels in 0..K -> (B, C_out, H, W)."""

    def __init__(self, arch: DiTArch) -> None:
        super().__init__()
        self.arch = arch
        width, patch = arch.hidden_size, arch.patch_size
        grid = arch.input_size // patch
        without_values = torch.get_default_device().type == "meta"
        table = torch.empty(1, grid * grid, width) if without_values else position_table(width, grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.x_embedder = PatchEmbedder(arch.in_channels, width, patch)
        self.t_embedder = TimestepEmbedder(width, arch.frequency_shift)
        self.y_embedder = LabelEmbedder(arch.num_classes, width, arch.null_class)
        self.blocks = nn.ModuleList([DiTBlock(arch) for _ in range(arch.depth)])
        self.final_layer = FinalLayer(width, patch * patch * arch.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side = self.arch.input_size
        if x.shape[1:] != (self.arch.in_channels, side, side):
            raise ValueError(
                f"the model takes ({self.arch.in_channels}, {side}, {side}) inputs; got {tuple(x.shape[1:])}"
            )
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, p * p * C_out), channel fastest -> (B, C_out, H, W)."""
        patch, channels = self.arch.patch_size, self.arch.out_channels
        grid = self.arch.input_size // patch
        patches = tokens.view(tokens.shape[0], grid, grid, patch, patch, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], channels, grid * patch, grid * patch)


@torch.no_grad()
def initialise(model: DiT, seed: int) -> None:
    """Fresh weights as published: Xavier-uniform linears, normal(0, 0.02) embedders, zero modulation and output."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
    projection = parameters["x_embedder.proj.weight"]
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1), generator=generator)
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        nn.init.normal_(parameters[f"{name}.weight"], std=0.02, generator=generator)
    for name, parameter in parameters.items():
        if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)


def classes_of_rows(rows: int, num_classes: int | None) -> tuple[int, bool]:
    """Classes of a label table of so many rows, and whether one more row is that of the null class.

    num_classes: as the user says; None assumes a null class, which only a table of one row has not. Raises ValueError where
    the table has neither as many rows nor one more.
    """
    if num_classes is None:
        return max(rows - 1, 1), rows != 1
    if rows - num_classes not in (0, 1):
        raise ValueError(
            f"the label table has {rows} rows, so there are {rows - 1} classes and a null class, or {rows} classes and none; "
            f"--num-classes {num_classes} is neither"
        )
    return num_classes, rows == num_classes + 1


def arch_of_state_dict(tensors: Mapping[str, Tensor], num_heads: int | None, num_classes: int | None = None) -> DiTArch:
    """The sizes that the shapes of an official state dict tell; heads come from the published table or `num_heads`.

    num_classes: without the null class, see `classes_of_rows`. Raises ValueError where the shapes are no DiT's or the heads
    cannot be known.
    """
    try:
        width, in_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        num_tokens = tensors["pos_embed"].shape[1]
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        patch_features = tensors["final_layer.linear.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these tensors are not a DiT's: {error} is missing or misshapen") from error
    grid = math.isqrt(num_tokens)
    if grid * grid != num_tokens:
        raise ValueError(f"pos_embed has {num_tokens} tokens, which is no square grid")
    depth = list_length(tensors, "blocks")
    heads = num_heads or HEADS_BY_WIDTH.get(width)
    if heads is None:
        raise ValueError(f"width {width} is in no published table, so the number of heads is unknown: give --num-heads")
    classes, null_class = classes_of_rows(rows, num_classes)
    return DiTArch(
        input_size=grid * patch,
        patch_size=patch,
        in_channels=in_channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=classes,
        learn_sigma=patch_features == 2 * in_channels * patch * patch,
        null_class=null_class,
    )
