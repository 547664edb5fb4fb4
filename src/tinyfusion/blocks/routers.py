"""Routers: which heads, groups, tokens and blocks run. One linear layer on the timestep embedding, a small MLP on tokens.

Names of submodules are the published ones, so that a state dict has the official keys. Routers are float32 in models of every
dtype, because rounding a logit near 0 to half precision flips decisions; but a bfloat16 stream, which is rounded already, is
multiplied by bfloat16 weights, in a seventh of the time.
Source: DyDiT (arXiv 2410.03456), sections 3.2 and 3.3. Differs: noise is an argument, drawn with the batch.

Shapes: B images, N tokens, D width, U units decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKEN_ROUTER_SHRINK = 16  # hidden layer of the token router: D / 16, published


@dataclass(frozen=True)
class DynamicSettings:
    """The kinds of routers and their settings.

    width: heads and groups by timestep. tokens: tokens of the MLP by content. depth: whole blocks by timestep (ours).
    forced_first: head 0 and group 0 always run, so a router has H - 1 outputs ("layout 2"); else H and all may be off
    ("layout 1", the files of December 2024). temperature: of the surrogate gradient. width_bias, token_bias, block_bias:
    initial biases, at which everything is on. Raises ValueError if no kind is on.
    """

    width: bool = True
    tokens: bool = True
    depth: bool = False
    forced_first: bool = True
    temperature: float = 5.0
    width_bias: float = 15.0
    token_bias: float = 35.0
    block_bias: float = 15.0

    def __post_init__(self) -> None:
        if not (self.width or self.tokens or self.depth):
            raise ValueError("a dynamic model decides on width, tokens or depth; all three are off")
        if self.temperature <= 0:
            raise ValueError(f"the temperature of routers is above 0; got {self.temperature:g}")


def hard(logits: Tensor) -> Tensor:
    """The decision without noise: 1.0 for logits above 0, else 0.0. No gradient."""
    return (logits.detach() > 0).float()


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Decisions of exactly 0 and 1 with the gradient of s = sigmoid((logit + noise) / temperature).

    noise: logistic (the difference of two Gumbels), so that P(1) = sigmoid(logit) at any temperature; zeros decide as at
    inference, with the gradient.
    """
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


class Float32Module(nn.Module):
    """A module that is moved to another device, but stays float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        applied: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return applied


class UnitRouter(Float32Module):
    """Timestep embedding (B, D) -> mask (B, U) over the heads or the groups of a block."""

    def __init__(self, width: int, num_units: int, settings: DynamicSettings) -> None:
        super().__init__()
        self.forced_first = settings.forced_first
        self.temperature = settings.temperature
        self.router = nn.Linear(width, num_units - settings.forced_first)

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, outputs) float32, without the forced unit."""
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(embedding.float(), self.router.weight.float(), self.router.bias.float())

    def forward(self, embedding: Tensor, noise: Tensor | None = None) -> Tensor:
        logits = self.logits(embedding)
        mask = hard(logits) if noise is None else straight_through(logits, noise, self.temperature)
        return F.pad(mask, (1, 0), value=1.0) if self.forced_first else mask


class BlockRouter(UnitRouter):
    """Timestep embedding (B, D) -> gate (B,) of the whole block. Not published."""

    def __init__(self, width: int, settings: DynamicSettings) -> None:
        nn.Module.__init__(self)
        self.forced_first = False
        self.temperature = settings.temperature
        self.router = nn.Linear(width, 1)

    def forward(self, embedding: Tensor, noise: Tensor | None = None) -> Tensor:
        return super().forward(embedding, noise).squeeze(-1)


@dataclass(frozen=True)
class TokenScores:
    """The weights of a token router, cast for a stream: the first layer in bfloat16 or float32, the last in float32."""

    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(B, N) float32."""
        hidden = F.relu(F.linear(x.to(self.first.dtype), self.first, self.first_bias))
        return F.linear(hidden.float(), self.last, self.last_bias).squeeze(-1)


class TokenRouter(Float32Module):
    """Residual stream (B, N, D) after the attention, not normalised -> mask (B, N)."""

    def __init__(self, width: int, settings: DynamicSettings) -> None:
        super().__init__()
        self.temperature = settings.temperature
        hidden = max(1, width // TOKEN_ROUTER_SHRINK)
        self.mlp_head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.held_in(x.dtype).logits(x)

    def held_in(self, dtype: torch.dtype) -> TokenScores:
        """The weights for streams of this dtype."""
        first, last = self.mlp_head[0], self.mlp_head[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        scores_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # float16 has too small a range
        return TokenScores(
            first.weight.to(scores_dtype), first.bias.to(scores_dtype), last.weight.float(), last.bias.float()
        )

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        logits = self.logits(x)
        return hard(logits) if noise is None else straight_through(logits, noise, self.temperature)


ROUTERS = ("attn_rate", "mlp_rate", "token_selection", "block_rate")  # submodules of a block, as published but the last


def is_router_key(name: str) -> bool:
    """Whether a tensor of a state dict belongs to a router."""
    return any(part in ROUTERS for part in name.split("."))


def settings_of(tensors: Mapping[str, Tensor], num_heads: int) -> DynamicSettings:
    """The settings from the router keys of a published state dict; the layout follows from the rows of width routers.

    Raises ValueError if there are no routers, or they have neither layout.
    """
    names = {part for name in tensors for part in name.split(".")}
    width, tokens, depth = "attn_rate" in names, "token_selection" in names, "block_rate" in names
    if not (width or tokens or depth):
        raise ValueError("these tensors have no routers: it is a static model")
    ends = ("attn_rate.router.weight", "mlp_rate.router.weight")
    rows = {len(value) for name, value in tensors.items() if name.endswith(ends)}
    if rows - {num_heads} and rows - {num_heads - 1}:
        raise ValueError(
            f"routers of width have {num_heads} outputs (layout 1) or {num_heads - 1} (layout 2, the first always on) for "
            f"{num_heads} heads; got {', '.join(map(str, sorted(rows)))}"
        )
    return DynamicSettings(width=width, tokens=tokens, depth=depth, forced_first=rows != {num_heads})


def unfit_official(settings: DynamicSettings) -> list[str]:
    """Reasons why the published file format cannot store routers of these settings."""
    reasons = []
    if settings.depth:
        reasons.append("its routers decide on whole blocks, for which the format has no keys")
    for name, what in (("width", "heads and channels"), ("tokens", "tokens")):
        if not getattr(settings, name):
            reasons.append(f"it has no routers of {what}, without which published readers refuse a file")
    return reasons


def install_routers(block: nn.Module, width: int, num_heads: int, settings: DynamicSettings) -> None:
    """Add the routers of `settings` to a block, without values; see `initialise_routers`."""
    if settings.width:
        block.add_module("attn_rate", UnitRouter(width, num_heads, settings))
        block.add_module("mlp_rate", UnitRouter(width, num_heads, settings))
    if settings.tokens:
        block.add_module("token_selection", TokenRouter(width, settings))
    if settings.depth:
        block.add_module("block_rate", BlockRouter(width, settings))


@torch.no_grad()
def initialise_routers(block: nn.Module, settings: DynamicSettings, generator: torch.Generator) -> None:
    """Initialise a block's routers in place: Xavier-uniform weights, and the biases of `settings` (default: all on)."""
    biases = {"attn_rate.router": settings.width_bias, "mlp_rate.router": settings.width_bias,
              "token_selection.mlp_head.0": 0.0, "token_selection.mlp_head.2": settings.token_bias,
              "block_rate.router": settings.block_bias}  # fmt: skip
    for name, bias in biases.items():
        owner = name.partition(".")[0]
        if hasattr(block, owner):
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.constant_(layer.bias, bias)
