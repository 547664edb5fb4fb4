"""Multiply-accumulates of a dynamic model, counted from shapes.

A block costs a + m: a = 4 N D I + 2 N^2 I for the attention (I = H d channels inside, D for a published model) and m = 2 N D M
for the MLP (M hidden channels). With a share p of heads, q of groups and s of tokens it costs p a + q s m. The ratio of a model is
the mean over its blocks, without other layers, modulations, norms and routers (DyDiT, arXiv 2410.03456; the formulas
reproduce its table of three sizes at 256 pixels).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinyfusion.blocks.dynamics import BlockMasks, BlockSizes
from tinyfusion.blocks.routers import TOKEN_ROUTER_SHRINK


def block_ratio(masks: BlockMasks, sizes: BlockSizes, num: int) -> Tensor:
    """(B,) share of a block's multiply-accumulates that runs under the decisions of `num` images, always-on units included."""
    ones = torch.ones(num)
    heads, groups, tokens = (ones if m is None else m.mean(dim=1) for m in (masks.heads, masks.groups, masks.tokens))
    device = next((m.device for m in (masks.heads, masks.tokens, masks.gate) if m is not None), ones.device)
    a, m = sizes.attention_macs, sizes.mlp_macs
    ratio = (a * heads.to(device) + m * groups.to(device) * tokens.to(device)) / (a + m)
    return ratio if masks.gate is None else ratio * masks.gate


def model_ratio(masks: Mapping[int, BlockMasks], sizes: BlockSizes, num: int) -> Tensor:
    """(B,) mean of `block_ratio` over the blocks of a model, r_b of the budget; 1 without decisions."""
    if not masks:
        return torch.ones(num)
    return torch.stack([block_ratio(block, sizes, num) for block in masks.values()]).mean(dim=0)


def kept_shares(masks: Mapping[int, BlockMasks]) -> dict[str, Tensor]:
    """(B,) shares of heads, groups, tokens and blocks that run, by name; mean over blocks. Undecided kinds are omitted."""
    shares = {}
    for name in ("heads", "groups", "tokens", "gate"):
        columns = [m for m in (getattr(block, name) for block in masks.values()) if m is not None]
        if columns:
            shares[f"kept_{name}"] = torch.stack([m.detach().reshape(len(m), -1).mean(1) for m in columns]).mean(0)
    return shares


def token_router_macs(sizes: BlockSizes) -> int:
    """Multiply-accumulates of one block's token router, which runs at inference and is not part of the budget."""
    hidden = max(1, sizes.width // TOKEN_ROUTER_SHRINK)
    return sizes.num_tokens * (sizes.width * hidden + hidden)


def total_macs(static: float, sizes: BlockSizes, depth: int, ratio: float, tokens: bool) -> float:
    """Multiply-accumulates of one forward pass of one image at a ratio of the blocks; `static`: those of the static model.

    Width routers are resolved before sampling and cost nothing. tokens: whether token routers run.
    """
    blocks = depth * (sizes.attention_macs + sizes.mlp_macs)
    routers = depth * token_router_macs(sizes) if tokens else 0
    return static - blocks * (1 - ratio) + routers
