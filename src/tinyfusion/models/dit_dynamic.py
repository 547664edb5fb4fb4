"""How a block of a DiT (or SiT, which has the same blocks) runs with some of its heads, hidden channels and tokens.

Two realisations that agree up to rounding: *masked* computes everything and multiplies, which training needs and which is
the reference; *sliced* computes only what is kept, with smaller weights and gathered tokens. A skipped token gets nothing
from the MLP, not even its output bias; a skipped head or group does leave the output bias to the tokens that are
processed. Source: DyDiT (arXiv 2410.03456), whose release has the masked form alone.

Shapes: B images, N tokens, D width, H heads of d channels, k of them kept, m hidden channels kept, K tokens kept of B * N.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.models.dit import DiTArch, DiTBlock, modulate
from tinyfusion.models.dynamics import BlockSizes, BlockSlices, DynamicRules, TokenMode, TokenSelection, bucket

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale and gate (B, D) of one branch


def block_sizes(arch: DiTArch) -> BlockSizes:
    """The sizes of every block of `arch`."""
    return BlockSizes(arch.hidden_size, arch.num_heads, arch.head_width, arch.mlp_width, arch.num_tokens)


# ------------------------------------------------------------------------------------------------------------- masked


def masked_block(
    block: DiTBlock,
    x: Tensor,
    c: Tensor,
    heads: Tensor | None = None,
    groups: Tensor | None = None,
    selection: TokenSelection | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The block at full cost with masks (B, H) on heads and groups, and the token mask (B, N) that `selection` gives.

    Masks of ones, and None, give the plain block bit for bit. The hidden mask stands before the GELU, as published: GELU(0) = 0.
    """
    batch, tokens, _ = x.shape
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    attention, mlp = block.attn, block.mlp
    projected = attention.qkv(modulate(block.norm1(x), shift_msa, scale_msa))
    q, k, v = projected.view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if heads is not None:
        mixed = mixed * heads.to(mixed.dtype)[:, None, :, None]
    x = torch.addcmul(x, gate_msa.unsqueeze(1), attention.proj(mixed.reshape(batch, tokens, -1)))

    mask = None if selection is None else selection(x, noise)
    gate = gate_mlp.unsqueeze(1)
    if mask is not None:
        gate = gate * mask.to(gate.dtype).unsqueeze(-1)
    hidden = mlp.fc1(modulate(block.norm2(x), shift_mlp, scale_mlp))
    if groups is not None:
        hidden = (hidden.unflatten(-1, (groups.shape[1], -1)) * groups.to(hidden.dtype)[:, None, :, None]).flatten(2)
    return torch.addcmul(x, gate, mlp.fc2(F.gelu(hidden, approximate="tanh"))), mask


# ------------------------------------------------------------------------------------------------------------- sliced


@torch.no_grad()
def block_slices(block: nn.Module, heads: Tensor, groups: Tensor, sizes: BlockSizes) -> BlockSlices:
    """Copies of the weights of these heads and groups (indices), in this order."""
    own = cast(DiTBlock, block)
    d, num_heads, width = sizes.head_width, sizes.num_heads, sizes.width
    qkv, proj = own.attn.qkv, own.attn.proj
    hidden = channels_of(groups, sizes.group_width)
    return BlockSlices(
        num_heads=len(heads),
        qkv=qkv.weight.view(3, num_heads, d, width).transpose(0, 1).index_select(0, heads).flatten(0, 2),
        qkv_bias=qkv.bias.view(3, num_heads, d).transpose(0, 1).index_select(0, heads).flatten(),
        proj=proj.weight.index_select(1, channels_of(heads, d)),
        fc1=own.mlp.fc1.weight.index_select(0, hidden),
        fc1_bias=own.mlp.fc1.bias.index_select(0, hidden),
        fc2=own.mlp.fc2.weight.index_select(1, hidden),
    )


def channels_of(units: Tensor, width: int) -> Tensor:
    """The channels of units that are `width` channels wide, unit by unit."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def first_units(slices: BlockSlices, heads: int, groups: int, sizes: BlockSizes) -> BlockSlices:
    """The first heads and groups of `slices`; no copies."""
    inner, hidden = heads * sizes.head_width, groups * sizes.group_width
    return BlockSlices(
        num_heads=heads,
        qkv=slices.qkv[: 3 * inner],
        qkv_bias=slices.qkv_bias[: 3 * inner],
        proj=slices.proj[:, :inner],
        fc1=slices.fc1[:hidden],
        fc1_bias=slices.fc1_bias[:hidden],
        fc2=slices.fc2[:, :hidden],
    )


def sliced_block(
    block: DiTBlock,
    kept: BlockSlices,
    x: Tensor,
    c: Tensor,
    selection: TokenSelection | None = None,
    mode: TokenMode = "gathered",
) -> tuple[Tensor, Tensor | int]:
    """The block with the units `kept` on all tokens, or on those that `selection` keeps; and how many those were.

    No gradients. mode: "gathered" computes exactly the kept tokens; "bucketed" rounds their number up to a multiple of 128,
    so that few shapes occur (compiled code, captured graphs); "masked" computes all tokens and multiplies, and is the one
    that never makes the host wait. `x` is not changed.
    """
    shift_msa, scale_msa, gate_msa, *of_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    modulation = cast(Modulation, tuple(of_mlp))
    x = _attention(block, kept, x, (shift_msa, scale_msa, gate_msa))
    if selection is None:
        return _mlp_everywhere(block, kept, x, modulation, None), x.shape[0] * x.shape[1]
    logits = selection.logits(x)
    if mode == "masked":
        keep = logits > 0
        return _mlp_everywhere(block, kept, x, modulation, keep), keep.sum()
    rows = (logits.flatten() > 0).nonzero().squeeze(1)
    count = len(rows)
    if count == logits.numel():
        return _mlp_everywhere(block, kept, x, modulation, None), count
    if count:
        _mlp_on_rows(block, kept, x, rows, modulation, bucketed=mode == "bucketed")
    return x, count


def _attention(block: DiTBlock, kept: BlockSlices, x: Tensor, modulation: Modulation) -> Tensor:
    """x after the attention with the kept heads; always a new tensor."""
    (batch, tokens, _), (shift, scale, gate) = x.shape, modulation
    bias = block.attn.proj.bias
    if kept.num_heads == 0:
        return torch.addcmul(x, gate.unsqueeze(1), bias)
    projected = F.linear(modulate(block.norm1(x), shift, scale), kept.qkv, kept.qkv_bias)
    q, k, v = projected.view(batch, tokens, kept.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    out = F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), kept.proj, bias)
    return torch.addcmul(x, gate.unsqueeze(1), out)


def _hidden(block: DiTBlock, kept: BlockSlices, u: Tensor) -> Tensor:
    """The MLP with the kept groups; without any, its output bias alone."""
    if len(kept.fc1) == 0:
        return block.mlp.fc2.bias.expand_as(u)
    return F.linear(F.gelu(F.linear(u, kept.fc1, kept.fc1_bias), approximate="tanh"), kept.fc2, block.mlp.fc2.bias)


def _mlp_everywhere(
    block: DiTBlock, kept: BlockSlices, x: Tensor, modulation: Modulation, keep: Tensor | None
) -> Tensor:
    """x after the MLP on all tokens, added where `keep` (B, N) says; in place: x is ours."""
    shift, scale, gate = modulation
    out = _hidden(block, kept, modulate(block.norm2(x), shift, scale))
    factor = gate.unsqueeze(1) if keep is None else gate.unsqueeze(1) * keep.to(gate.dtype).unsqueeze(-1)
    return x.addcmul_(factor, out)


def _mlp_on_rows(
    block: DiTBlock, kept: BlockSlices, x: Tensor, rows: Tensor, modulation: Modulation, bucketed: bool
) -> None:
    """Add what the MLP gives the tokens `rows` (K,) of the flattened B * N, in place.

    Tokens are gathered over the flattened batch, so images may keep different numbers of them. The norm comes after the
    gathering: it is of each token by itself.
    """
    shift, scale, gate = modulation
    flat, count = x.view(-1, x.shape[-1]), len(rows)
    if bucketed:  # surplus rows compute with the first token and are dropped
        rows = F.pad(rows, (0, bucket(count, len(flat)) - count))
    images = rows // x.shape[1]
    picked = flat.index_select(0, rows)
    u = torch.addcmul(shift.index_select(0, images), block.norm2(picked), 1 + scale.index_select(0, images))
    new = torch.addcmul(picked, gate.index_select(0, images), _hidden(block, kept, u))
    flat.index_copy_(0, rows[:count], new[:count])


# --------------------------------------------------------------------------------------------------- order of the units


@torch.no_grad()
def unit_scores(block: nn.Module, sizes: BlockSizes) -> tuple[Tensor, Tensor]:
    """Sums of absolute weights: (H,) per head over q, k, v and the output, (hidden,) per hidden channel over both layers."""
    own = cast(DiTBlock, block)
    heads = own.attn.qkv.weight.abs().sum(1).view(3, sizes.num_heads, -1).sum((0, 2))
    heads = heads + own.attn.proj.weight.abs().sum(0).view(sizes.num_heads, -1).sum(1)
    return heads, own.mlp.fc1.weight.abs().sum(1) + own.mlp.fc2.weight.abs().sum(0)


@torch.no_grad()
def reorder_units(block: nn.Module, heads: Tensor, hidden: Tensor, sizes: BlockSizes) -> None:
    """Put heads and hidden channels in these orders, in place; the block computes what it did."""
    own = cast(DiTBlock, block)
    inner = channels_of(heads, sizes.head_width)
    thirds = torch.arange(3, device=inner.device).unsqueeze(1) * len(inner)
    qkv_rows = (thirds + inner).flatten()
    for layer, rows, columns in (
        (own.attn.qkv, qkv_rows, None),
        (own.attn.proj, None, inner),
        (own.mlp.fc1, hidden, None),
        (own.mlp.fc2, None, hidden),
    ):
        if rows is not None:
            layer.weight.copy_(layer.weight[rows])
            layer.bias.copy_(layer.bias[rows])
        if columns is not None:
            layer.weight.copy_(layer.weight[:, columns])


DIT_DYNAMIC = DynamicRules(
    embedder="t_embedder",
    sizes=block_sizes,
    masked=masked_block,
    slices=block_slices,
    prefix=first_units,
    sliced=sliced_block,
    scores=unit_scores,
    reorder=reorder_units,
)
