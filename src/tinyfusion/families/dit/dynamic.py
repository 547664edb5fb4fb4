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

from tinyfusion.blocks.dynamics import (
    BUCKET,
    BlockSizes,
    BlockSlices,
    DynamicRules,
    Form,
    TokenLogits,
    TokenMode,
    TokenSelection,
    UnitKind,
    UnitSlices,
    as_written,
    bucket,
    linear_of,
)
from tinyfusion.blocks.packed import gelu_linear, row_step
from tinyfusion.families.dit.model import DiTArch, DiTBlock, modulate

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
def unit_slices(block: nn.Module, kind: UnitKind, units: Tensor, sizes: BlockSizes) -> UnitSlices:
    """Copies of the weights of these heads or groups (indices), in this order."""
    own = cast(DiTBlock, block)
    if kind == "groups":
        fc1, fc2 = own.mlp.fc1, own.mlp.fc2
        per_group = (sizes.num_heads, sizes.group_width)
        rows = fc1.weight.view(*per_group, sizes.width).index_select(0, units).flatten(0, 1)
        bias = fc1.bias.view(per_group).index_select(0, units).flatten()
        columns = fc2.weight.view(sizes.width, *per_group).index_select(1, units).flatten(1)
        return UnitSlices(len(units), linear_of(rows, bias), linear_of(columns, fc2.bias))
    qkv, proj = own.attn.qkv, own.attn.proj
    per_head = (3, sizes.num_heads, sizes.head_width)
    rows = qkv.weight.view(*per_head, sizes.width).transpose(0, 1).index_select(0, units).flatten(0, 2)
    bias = qkv.bias.view(per_head).transpose(0, 1).index_select(0, units).flatten()
    columns = proj.weight.view(sizes.width, *per_head[1:]).index_select(1, units).flatten(1)
    return UnitSlices(len(units), linear_of(rows, bias), linear_of(columns, proj.bias))


def channels_of(units: Tensor, width: int) -> Tensor:
    """The channels of units that are `width` channels wide, unit by unit."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def sliced_block(
    block: DiTBlock,
    kept: BlockSlices,
    x: Tensor,
    modulations: Tensor,
    selection: TokenLogits | None = None,
    mode: TokenMode = "gathered",
    form: Form = as_written,
) -> tuple[Tensor, Tensor | int]:
    """The block with the units `kept` on all tokens, or on those that `selection` keeps; and how many those were.

    modulations: (B, 6 D), what the block makes of time and label. form: gives the function that runs instead of a pass over the
    stream, such as its compiled form. No gradients.
    mode: "gathered" computes the kept tokens, and few more where the layers are packed; "bucketed" rounds their number up to a
    multiple of 128, so that few shapes occur (compiled code, captured graphs); "masked" computes all tokens and multiplies,
    and is the one that never makes the host wait. `x` is not changed.
    """
    shift_msa, scale_msa, gate_msa, shift, scale, gate = modulations.chunk(6, dim=1)
    if kept.heads.number:
        mixed = _attention(kept.heads, form(_entered)(block.norm1, x, shift_msa, scale_msa))
    else:
        mixed = block.attn.proj.bias.expand_as(x)
    if selection is None:
        x, u = form(_between)(block.norm2, x, gate_msa, mixed, shift, scale)
        return form(_added)(x, gate, _hidden(block, kept.groups, u)), x.shape[0] * x.shape[1]
    x = form(_added)(x, gate_msa, mixed)
    logits = selection.logits(x)
    if mode == "masked":
        keep = logits > 0
        out = _hidden(block, kept.groups, form(_entered)(block.norm2, x, shift, scale))
        return torch.addcmul(x, _masked(gate, keep), out), keep.sum()
    rows = (logits.flatten() > 0).nonzero().squeeze(1)
    count = len(rows)
    if count == logits.numel():
        out = _hidden(block, kept.groups, form(_entered)(block.norm2, x, shift, scale))
        return form(_added)(x, gate, out), count
    if count:
        _mlp_on_rows(block, kept.groups, x, rows, (shift, scale, gate), mode == "bucketed", form)
    return x, count


def _entered(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return modulate(norm(x), shift, scale)


def _between(
    norm: nn.Module, x: Tensor, gate: Tensor, out: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x = _added(x, gate, out)
    return x, _entered(norm, x, shift, scale)


def _added(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    return torch.addcmul(x, gate.unsqueeze(1), out)


def _gathered(norm: nn.Module, x: Tensor, rows: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens `rows` (K,) of the flattened B * N as they are (K, D), and as the MLP takes them."""
    images = rows // x.shape[1]
    picked = x.view(-1, x.shape[-1]).index_select(0, rows)
    factor = 1 + scale.index_select(0, images)
    return picked, torch.addcmul(shift.index_select(0, images), norm(picked), factor)


def _added_to_rows(picked: Tensor, gate: Tensor, out: Tensor, rows: Tensor, tokens: int) -> Tensor:
    return torch.addcmul(picked, gate.index_select(0, rows // tokens), out)


def _masked(gate: Tensor, keep: Tensor) -> Tensor:
    """gate (B, D) where keep (B, N), and 0 elsewhere."""
    return gate.unsqueeze(1) * keep.to(gate.dtype).unsqueeze(-1)


def _attention(kept: UnitSlices, u: Tensor) -> Tensor:
    batch, tokens, _ = u.shape
    q, k, v = kept.into(u).view(batch, tokens, kept.number, 3, -1).permute(3, 0, 2, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    out: Tensor = kept.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
    return out


def _hidden(block: DiTBlock, kept: UnitSlices, u: Tensor) -> Tensor:
    """The MLP with the kept groups; without any, its output bias alone."""
    if kept.number == 0:
        return block.mlp.fc2.bias.expand_as(u)
    out: Tensor = kept.out(gelu_linear(kept.into, u, "tanh"))
    return out


def _mlp_on_rows(
    block: DiTBlock, kept: UnitSlices, x: Tensor, rows: Tensor, modulation: Modulation, bucketed: bool, form: Form
) -> None:
    """Add what the MLP gives the tokens `rows` (K,) of the flattened B * N, in place: x is ours.

    Tokens are gathered over the flattened batch, so images may keep different numbers of them. The norm comes after the
    gathering: it is of each token by itself.
    """
    (shift, scale, gate), count, tokens = modulation, len(rows), x.shape[1]
    flat = x.view(-1, x.shape[-1])
    step = BUCKET if bucketed else row_step(kept.into, len(flat))
    more = bucket(count, len(flat), step)
    if more > count:  # surplus rows compute with the first token and are dropped
        rows = F.pad(rows, (0, more - count))
    picked, u = form(_gathered)(block.norm2, x, rows, shift, scale)
    new = form(_added_to_rows)(picked, gate, _hidden(block, kept, u), rows, tokens)
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
    labels="y_embedder",
    modulation="adaLN_modulation",
    sizes=block_sizes,
    masked=masked_block,
    slices=unit_slices,
    sliced=sliced_block,
    scores=unit_scores,
    reorder=reorder_units,
)
