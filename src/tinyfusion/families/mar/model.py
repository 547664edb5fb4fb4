"""MAR: masked autoregressive image generation (Li et al., arXiv 2406.11838), official state-dict keys.

Shapes: B images, C channels, S side, p patch side, L = (S / p)^2 tokens of E = C p^2 values each, n buffer tokens, D width
(of the decoder D'), u known and m = L - u hidden tokens of every image, K classes.
The encoder sees the buffer and the known tokens, the decoder all places, and a small diffusion head (`families/mar/head.py`)
denoises one hidden token at a time. The model draws nothing: which tokens are hidden, noise, timesteps and dropout come
with the call, and label K is the null class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfusion.blocks.tokens import taken, to_tokens
from tinyfusion.families.mar.block import NORM_EPS, Dropout, MarBlock
from tinyfusion.families.mar.head import DiffusionHead, HeadSizes, initialise_head
from tinyfusion.families.sizes import check_ranges, list_length
from tinyfusion.families.stage import Stage


@dataclass(frozen=True)
class MarArch:
    """Every size of a MAR.

    decoder_width, decoder_heads: None where they are those of the encoder, as in all published models; a given value that
    equals them becomes None.
    """

    input_size: int  # side of the square input in the model's own space (latent or pixel)
    patch_size: int
    in_channels: int
    hidden_size: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    num_classes: int  # without the null class
    buffer_size: int = 64  # tokens that carry the class
    head_depth: int = 3  # residual layers of the diffusion head
    head_width: int = 1024
    decoder_width: int | None = None
    decoder_heads: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "input_size", "patch_size", "in_channels", "hidden_size", "encoder_depth", "decoder_depth",
                     "num_heads", "num_classes", "buffer_size", "head_depth", "head_width", "decoder_width",
                     "decoder_heads")  # fmt: skip
        for stack, width, heads in (("hidden_size", self.hidden_size, self.num_heads),
                                    ("decoder_width", self.decoder_features, self.heads_of_decoder)):  # fmt: skip
            if width % heads:
                raise ValueError(f"{stack} {width} is not a multiple of its {heads} heads")
        if self.decoder_width == self.hidden_size:
            object.__setattr__(self, "decoder_width", None)
        if self.decoder_heads == self.num_heads:
            object.__setattr__(self, "decoder_heads", None)

    @property
    def decoder_features(self) -> int:
        """D', width of the decoder."""
        return self.decoder_width or self.hidden_size

    @property
    def heads_of_decoder(self) -> int:
        """Attention heads of the decoder."""
        return self.decoder_heads or self.num_heads

    @property
    def num_tokens(self) -> int:
        """L, tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def token_features(self) -> int:
        """E, values of one token."""
        return self.in_channels * self.patch_size**2


# name -> (width, depth of either stack, heads, depth and width of the released head); Source: arXiv 2406.11838, released files.
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "mar_base": (768, 12, 12, 6, 1024),
    "mar_large": (1024, 16, 16, 8, 1280),
    "mar_huge": (1280, 20, 16, 12, 1536),
}
HEADS_BY_WIDTH = {width: heads for width, _, heads, _, _ in SIZES.values()}


def published_arch(name: str) -> MarArch:
    """The released model `name` of 256-pixel images. Raises ValueError on an unknown name."""
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(SIZES)}")
    width, depth, heads, head_depth, head_width = SIZES[name]
    return MarArch(16, 1, 16, width, depth, depth, heads, 1000, head_depth=head_depth, head_width=head_width)


class Mar(nn.Module):
    """The whole model. Known and hidden places of an image together are all of its L places, in any order."""

    def __init__(self, arch: MarArch) -> None:
        super().__init__()
        self.arch = arch
        width, decoder_width, places = arch.hidden_size, arch.decoder_features, arch.buffer_size + arch.num_tokens
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, places, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, places, decoder_width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, arch.num_tokens, decoder_width))
        self.class_emb = nn.Embedding(arch.num_classes, width)
        self.z_proj = nn.Linear(arch.token_features, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.encoder_blocks = nn.ModuleList([MarBlock(width, arch.num_heads) for _ in range(arch.encoder_depth)])
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        decoder_blocks = [MarBlock(decoder_width, arch.heads_of_decoder) for _ in range(arch.decoder_depth)]
        self.decoder_blocks = nn.ModuleList(decoder_blocks)
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=NORM_EPS)
        sizes = HeadSizes(arch.token_features, decoder_width, arch.head_depth, arch.head_width)
        self.diffloss = nn.ModuleDict({"net": DiffusionHead(sizes)})

    @property
    def head(self) -> DiffusionHead:
        """The diffusion head."""
        head = self.diffloss["net"]
        assert isinstance(head, DiffusionHead)
        return head

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        known: Tensor,
        hidden: Tensor,
        rows: Tensor,
        t: Tensor,
        dropout: tuple[Tensor, float, float] | None = None,
    ) -> Tensor:
        """What the head says of noised hidden tokens: (B, m, r, 2E), noise prediction and variance logits.

        x (B, C, S, S) clean, of which only the known tokens are used; y (B,) in 0..K; known (B, u) and hidden (B, m) places
        0..L - 1; rows (B, m, r, E) noised tokens, r of each, t (B, m, r) their original steps 0..999; dropout: the fields of
        `Dropout`.
        """
        drop = None if dropout is None else Dropout(*dropout)
        z = taken(self.condition(to_tokens(x, self.arch.patch_size), y, known, hidden, drop), hidden)
        return self.head(rows, t, self.head.conditions(z).unsqueeze(2))

    def condition(
        self, tokens: Tensor, y: Tensor, known: Tensor, hidden: Tensor, dropout: Dropout | None = None
    ) -> Tensor:
        """z (B, L, D') of all places, from tokens (B, L, E)."""
        return self.decode(self.encode(tokens, y, known, dropout), known, hidden, dropout)

    def encode(self, tokens: Tensor, y: Tensor, known: Tensor, dropout: Dropout | None = None) -> Tensor:
        """tokens (B, L, E), y (B,), known (B, u) -> (B, n + u, D): buffer first, then the known tokens in their given order."""
        arch = self.arch
        if tokens.shape[1:] != (arch.num_tokens, arch.token_features):
            raise ValueError(
                f"the model takes {arch.num_tokens} tokens of {arch.token_features} values; got {tuple(tokens.shape[1:])}"
            )
        # both sides of the choice are in the graph, so every parameter has a gradient whatever the labels are
        named = self.class_emb(y.clamp(max=arch.num_classes - 1))
        classes = torch.where((y == arch.num_classes).unsqueeze(1), self.fake_latent.to(named.dtype), named)
        buffer = classes.unsqueeze(1).expand(-1, arch.buffer_size, -1)
        x = torch.cat([buffer, self.z_proj(tokens).to(buffer.dtype)], dim=1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = torch.cat([x[:, : arch.buffer_size], taken(x[:, arch.buffer_size :], known)], dim=1)
        x = self._through(self.encoder_blocks, x, dropout, 0)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, known: Tensor, hidden: Tensor, dropout: Dropout | None = None) -> Tensor:
        """encoded (B, n + u, D) -> z (B, L, D') of all places."""
        buffer_size = self.arch.buffer_size
        x = self.decoder_embed(encoded)
        # a len() would be a constant of graphs
        blank = self.mask_token.to(x.dtype).expand(x.shape[0], hidden.shape[1], -1)
        listed = torch.cat([x[:, buffer_size:], blank], dim=1)
        in_place = taken(listed, torch.cat([known, hidden], dim=1).argsort(dim=1))
        x = torch.cat([x[:, :buffer_size], in_place], dim=1) + self.decoder_pos_embed_learned
        x = self._through(self.decoder_blocks, x, dropout, len(self.encoder_blocks))
        return self.decoder_norm(x)[:, buffer_size:] + self.diffusion_pos_embed_learned

    def _through(self, blocks: nn.ModuleList, x: Tensor, dropout: Dropout | None, first: int) -> Tensor:
        for index, block in enumerate(blocks):
            x = block(x) if dropout is None or not self.training else block(x, dropout.of(first + index))
        return x


@torch.no_grad()
def initialise(model: Mar, seed: int) -> None:
    """Fresh weights as published: Xavier-uniform linears, normal(0, 0.02) tables and tokens, norms at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("_embed_learned") or name in ("fake_latent", "mask_token", "class_emb.weight"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
    initialise_head(model.head, generator)


def undecayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay leaves a parameter alone: those of one dimension, biases, and the whole head (as published)."""
    return parameter.ndim == 1 or name.endswith(".bias") or name.startswith("diffloss.")


def example_inputs(arch: MarArch, num: int) -> tuple[Tensor, ...]:
    """Inputs of one forward pass on `num` images: half of the tokens are known, the others are denoised once each."""
    places = torch.arange(arch.num_tokens).expand(num, -1)
    known, hidden = places[:, : arch.num_tokens // 2], places[:, arch.num_tokens // 2 :]
    x = torch.zeros(num, arch.in_channels, arch.input_size, arch.input_size)
    rows = torch.zeros(num, hidden.shape[1], 1, arch.token_features)
    return x, torch.zeros(num, dtype=torch.int64), known, hidden, rows, torch.zeros(rows.shape[:3], dtype=torch.int64)


def stages(model: Mar) -> dict[str, Stage]:
    """What the sampler calls: in every round `condition`, of all places, and for every step of a token `head`.

    condition: tokens (B, L, E), y (B,), known (B, u) and hidden (B, m) places -> (B, L, W), what the head takes. head: noised tokens
    x (N, E), t (N,) original steps, condition (N, W) -> (N, 2E), noise prediction and variance logits.
    """
    arch = model.arch

    def rounds(num: int, generator: torch.Generator) -> dict[str, Tensor]:
        places = torch.rand(num, arch.num_tokens, generator=generator).argsort(dim=1)
        split = (arch.num_tokens + 1) // 2
        return {
            "tokens": torch.randn(num, arch.num_tokens, arch.token_features, generator=generator),
            "y": torch.randint(arch.num_classes + 1, (num,), generator=generator),
            "known": places[:, :split],
            "hidden": places[:, split:],
        }

    def steps(num: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "x": torch.randn(num, arch.token_features, generator=generator),
            "t": torch.rand(num, generator=generator) * 999,
            "condition": torch.randn(num, arch.head_width, generator=generator),
        }

    def condition(tokens: Tensor, y: Tensor, known: Tensor, hidden: Tensor) -> Tensor:
        return model.head.conditions(model.condition(tokens, y, known, hidden))

    of_rounds = {name: {0: "batch"} for name in ("tokens", "y", "output")}
    of_rounds |= {"known": {0: "batch", 1: "num_known"}, "hidden": {0: "batch", 1: "num_hidden"}}
    of_steps = {name: {0: "rows"} for name in ("x", "t", "condition", "output")}
    return {"condition": Stage(model, condition, rounds, of_rounds), "head": Stage(model, model.head, steps, of_steps)}


def unfit_formats(arch: MarArch, _tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Formats of others that cannot hold a MAR, with the reason: diffusers never, the official state dict where its readers
    would take other sizes than the file was made with.
    """
    reasons = {"diffusers": "diffusers has no class for the family mar"}
    if arch.patch_size != 1:
        side = arch.patch_size
        reasons["official"] = (
            f"its tokens are {side} x {side} cells, which the file does not say, and readers take single ones"
        )
    for width, heads in ((arch.hidden_size, arch.num_heads), (arch.decoder_features, arch.heads_of_decoder)):
        published = HEADS_BY_WIDTH.get(width, heads)
        if published != heads:
            reasons["official"] = (
                f"it has {heads} heads, which the file does not say, and readers take {published} at width {width}"
            )
    return reasons


def arch_of_state_dict(tensors: Mapping[str, Tensor], num_heads: int | None, num_classes: int | None = None) -> MarArch:
    """The sizes that the shapes of an official state dict tell; heads come from the published table or `num_heads`.

    Patches are taken to be single cells, as in all published models: shapes cannot tell 16 channels from 4 times 2 x 2.
    Raises ValueError where the shapes are no MAR's or the heads cannot be known.
    """
    try:
        width, token_features = tensors["z_proj.weight"].shape
        _, places, _ = tensors["encoder_pos_embed_learned"].shape
        _, num_tokens, decoder_width = tensors["diffusion_pos_embed_learned"].shape
        rows = tensors["class_emb.weight"].shape[0]
        head_width = tensors["diffloss.net.input_proj.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"these tensors are not a MAR's: {error} is missing or misshapen") from error
    if num_classes not in (None, rows):
        raise ValueError(f"the class table has {rows} rows, one per class; --num-classes {num_classes} contradicts it")
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"diffusion_pos_embed_learned has {num_tokens} tokens, which is no square grid")
    if places <= num_tokens:
        raise ValueError(f"encoder_pos_embed_learned has {places} places for {num_tokens} tokens: there is no buffer")
    heads = [num_heads or HEADS_BY_WIDTH.get(w) for w in (width, decoder_width)]
    for known, w in zip(heads, (width, decoder_width), strict=True):
        if known is None:
            raise ValueError(f"width {w} is in no published table, so the number of heads is unknown: give --num-heads")
    return MarArch(
        input_size=side,
        patch_size=1,
        in_channels=token_features,
        hidden_size=width,
        encoder_depth=list_length(tensors, "encoder_blocks"),
        decoder_depth=list_length(tensors, "decoder_blocks"),
        num_heads=heads[0] or 1,
        num_classes=rows,
        buffer_size=places - num_tokens,
        head_depth=list_length(tensors, "diffloss.net.res_blocks"),
        head_width=head_width,
        decoder_width=decoder_width,
        decoder_heads=heads[1],
    )
