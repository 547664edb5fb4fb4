"""Multiply-accumulates of what runs, counted from shapes at any size. Nothing is tabulated.

A block costs a + m: a = 4 N D I + 2 N^2 I for the attention (I = H d channels inside, D for a published model) and m = 2 N D M
for the MLP (M hidden channels). With a share p of heads, q of groups and s of tokens it costs p a + q s m. The ratio of a model is
the mean over its blocks, and leaves out what is not in them, their modulations, norms, and the routers (DyDiT, arXiv
2410.03456, whose table of three sizes at 256 pixels these formulas give).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinyfusion.blocks.dynamics import BlockSizes
from tinyfusion.blocks.routed import BlockMasks
from tinyfusion.blocks.routers import TOKEN_ROUTER_SHRINK


def block_ratio(masks: BlockMasks, sizes: BlockSizes, num: int) -> Tensor:
    """(B,) share of a block's multiply-accumulates that the decisions of `num` images leave, always-on units included."""
    one = torch.ones(num)
    heads, groups, tokens = (one if m is None else m.mean(dim=1) for m in (masks.heads, masks.groups, masks.tokens))
    device = next((m.device for m in (masks.heads, masks.tokens, masks.gate) if m is not None), one.device)
    a, m = sizes.attention_macs, sizes.mlp_macs
    ratio = (a * heads.to(device) + m * groups.to(device) * tokens.to(device)) / (a + m)
    return ratio if masks.gate is None else ratio * masks.gate


def model_ratio(masks: Mapping[int, BlockMasks], sizes: BlockSizes, num: int) -> Tensor:
    """(B,) mean of `block_ratio` over the blocks of a model: r_b, which the budget holds on average; 1 where none decided."""
    if not masks:
        return torch.ones(num)
    return torch.stack([block_ratio(one, sizes, num) for one in masks.values()]).mean(dim=0)


def kept_shares(masks: Mapping[int, BlockMasks]) -> dict[str, Tensor]:
    """(B,) share of heads, groups, tokens and blocks that run, of those that are decided on; mean over blocks."""
    found = {}
    for name in ("heads", "groups", "tokens", "gate"):
        columns = [m for m in (getattr(one, name) for one in masks.values()) if m is not None]
        if columns:
            found[f"kept_{name}"] = torch.stack([m.detach().reshape(len(m), -1).mean(1) for m in columns]).mean(0)
    return found


def token_router_macs(sizes: BlockSizes) -> int:
    """Multiply-accumulates of the token router of one block, which runs at inference and is in no budget."""
    hidden = max(1, sizes.width // TOKEN_ROUTER_SHRINK)
    return sizes.num_tokens * (sizes.width * hidden + hidden)


def total_macs(static: float, sizes: BlockSizes, depth: int, ratio: float, tokens: bool) -> float:
    """Of one forward pass of one image at this ratio of the blocks, from `static`, the whole of the static model.

    Width routers are resolved before sampling and cost nothing; `tokens`: the token routers run.
    """
    blocks = depth * (sizes.attention_macs + sizes.mlp_macs)
    routers = depth * token_router_macs(sizes) if tokens else 0
    return static - blocks * (1 - ratio) + routers
