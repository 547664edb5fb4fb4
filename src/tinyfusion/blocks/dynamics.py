"""Blocks whose heads, hidden channels and tokens are chosen for every timestep and image: rules of a family, and executors.

Units: a block has H heads and H groups of hidden channels. Unit h of the attention is head h (its rows of q, k and v, its
columns of the output projection), unit j of the MLP a run of hidden channels (rows of the first layer, columns of the second).
An executor runs the blocks: as at inference (`Deciding`, the default), completely (`Complete`), under drawn noise (training,
`dynamic/train.py`), or as sub-networks that were resolved before (`dynamic/subnetworks.py`).
Source: DyDiT (arXiv 2410.03456).

Shapes: B images, N tokens, D width, H heads, d channels of a head, g hidden channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tinyfusion.blocks.packed import held_bytes, packed
from tinyfusion.blocks.routers import TOKEN_ROUTER_SHRINK
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams
from tinyfusion.core.errors import UserError

TokenMode = Literal["gathered", "bucketed", "masked"]
BUCKET = 128  # rows
UnitKind = Literal["heads", "groups"]
Form = Callable[[Callable[..., Any]], Callable[..., Any]]  # a function to the one that runs, such as its compiled form


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of every block. Raises ValueError if the hidden channels cannot be split into as many groups as heads."""

    width: int
    num_heads: int
    head_width: int
    mlp_width: int
    num_tokens: int

    def __post_init__(self) -> None:
        if self.mlp_width % self.num_heads:
            raise ValueError(
                f"{self.mlp_width} hidden channels of an MLP cannot be split into {self.num_heads} equal groups, one per head"
            )

    @property
    def group_width(self) -> int:
        return self.mlp_width // self.num_heads

    @property
    def attention_macs(self) -> int:
        """Multiply-accumulates of the attention with all heads: q, k, v, output projection, both products of attention."""
        inner = self.num_heads * self.head_width
        return 4 * self.num_tokens * self.width * inner + 2 * self.num_tokens**2 * inner

    @property
    def mlp_macs(self) -> int:
        """Multiply-accumulates of the MLP with all groups on all tokens."""
        return 2 * self.num_tokens * self.width * self.mlp_width


class TokenLogits(Protocol):
    """Selects the tokens of the MLP at inference."""

    def logits(self, x: Tensor) -> Tensor:
        """x (B, N, D) after the attention -> (B, N) float32; tokens with logits above 0 are processed."""
        ...


class TokenSelection(TokenLogits, Protocol):
    """A module that selects the tokens of the MLP."""

    def __call__(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, N, D) after the attention, noise (B, N) in training -> mask (B, N) float32 of exactly 0 and 1."""
        ...


@dataclass(frozen=True)
class UnitSlices:
    """The layers of some units of a block, unit after unit, on copies of its weights or views of such a copy.

    number: of units, k. into: D -> k * rows, where a row of a head is one of its q, then k, then v. out: k * columns -> D, with
    the bias of the whole layer.
    """

    number: int
    into: nn.Module
    out: nn.Module

    def first(self, number: int) -> UnitSlices:
        """The first units, as views."""
        assert isinstance(self.into, nn.Linear) and isinstance(self.out, nn.Linear)
        sizes = (len(self.into.weight), self.out.weight.shape[1])
        rows, columns = (size // max(1, self.number) * number for size in sizes)
        into = linear_of(self.into.weight[:rows], self.into.bias[:rows])
        return UnitSlices(number, into, linear_of(self.out.weight[:, :columns], self.out.bias))

    def packed(self) -> UnitSlices:
        """The same layers with prepacked weights, see `blocks/packed.py`."""
        return UnitSlices(self.number, packed(self.into), packed(self.out))

    @property
    def num_bytes(self) -> int:
        return held_bytes(self.into) + held_bytes(self.out)


@dataclass(frozen=True)
class BlockSlices:
    """A sub-network of one block."""

    heads: UnitSlices
    groups: UnitSlices


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """An inference-only linear layer on these tensors themselves."""
    layer = nn.Linear(1, 1, device="meta")  # not of the size: torch warns about sizes of 0
    layer.out_features, layer.in_features = weight.shape
    layer.weight, layer.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias))
    return layer


def bucket(count: int, limit: int, step: int = BUCKET) -> int:
    """`count` rounded up to a multiple of `step`, at most `limit`."""
    return min(step * math.ceil(count / step), limit)


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `Form` that runs functions as they are."""
    return function


@dataclass(frozen=True)
class DynamicRules:
    """A family's rules for its blocks, which have one stream.

    embedder: the submodule from times (B,) to their embedding (B, D). labels: the one from labels to theirs; blocks get the
    sum. modulation: the submodule of a block that takes it, for the `modulation` of `sliced`. sizes: of the blocks of an arch.
    masked: the block at full cost with masks multiplied in, for training and as a reference:
    (block, x, c, heads (B, H) or None, groups (B, H) or None, selection or None, token noise or None) -> (x, token mask or None).
    slices: (block, kind, indices of units, sizes) -> copies of these units, in this order.
    sliced: (block, slices, x, modulation, token logits or None, token mode, form) -> (x, number of tokens in the MLP, an int or
    a tensor).
    scores: block -> importance of every head (H,) and of every hidden channel. reorder: permute both, in place, without
    changing the function: (block, order of heads, order of hidden channels).
    """

    embedder: str
    labels: str
    modulation: str
    sizes: Callable[[Any], BlockSizes]
    masked: Callable[..., tuple[Tensor, Tensor | None]]
    slices: Callable[[nn.Module, UnitKind, Tensor, BlockSizes], UnitSlices]
    sliced: Callable[..., tuple[Tensor, Tensor | int]]
    scores: Callable[[nn.Module, BlockSizes], tuple[Tensor, Tensor]]
    reorder: Callable[[nn.Module, Tensor, Tensor, BlockSizes], None]


# -------------------------------------------------------------------------------------------------------------- executors


class BlockExecutor(Protocol):
    """Runs the blocks of a model with routers."""

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """Start a forward pass at times (B,) with embedding (B, D)."""
        return

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor: ...


class Complete(BlockExecutor):
    """Runs everything: the static model, bit for bit."""

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        return dynamic.forward(x, c)[0]


@dataclass(frozen=True)
class BlockMasks:
    """The decisions for one block: heads (B, H), groups (B, H), tokens (B, N), gate (B,); None: everything is on."""

    heads: Tensor | None = None
    groups: Tensor | None = None
    tokens: Tensor | None = None
    gate: Tensor | None = None


class Deciding(BlockExecutor):
    """Decides for every image, without noise and at full cost: the reference. `masks` are those of the last pass."""

    def __init__(self) -> None:
        self.embedding: Tensor | None = None
        self.masks: dict[int, BlockMasks] = {}

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        self.embedding, self.masks = embedding, {}

    def noise(self, router: str, index: int) -> Tensor | None:
        """Noise of a router of block `index`; None decides as at inference, without gradients."""
        return None

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        if self.embedding is None or len(self.embedding) != len(x):  # a block on its own, without decisions
            return dynamic.forward(x, c)[0]
        index, masks = dynamic.index, dict[str, Tensor | None]()
        for name in ("attn_rate", "mlp_rate", "block_rate"):
            router = getattr(dynamic.block, name, None)
            masks[name] = None if router is None else router(self.embedding, self.noise(name, index))
        heads, groups, gate = masks["attn_rate"], masks["mlp_rate"], masks["block_rate"]
        selection = getattr(dynamic.block, "token_selection", None)
        out, tokens = dynamic.forward(x, c, heads, groups, selection, self.noise("token_selection", index))
        self.masks[index] = BlockMasks(heads, groups, tokens, gate)
        if gate is None:
            return out
        share = gate.to(out.dtype).view(-1, 1, 1)
        return share * out + (1 - share) * x


class Current:
    """The current executor of a model, shared by its embedders of time and label and all of its blocks."""

    def __init__(self) -> None:
        self.executor: BlockExecutor = Deciding()
        self.labels: Tensor | None = None  # their embeddings (B, D) in the present pass

    def labelled(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Hook on the label embedder."""
        self.labels = output.detach()

    def embedded(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook on the timestep embedder."""
        self.executor.begin(args[0], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Current:
        """A copy of a model decides as at inference, without the state of a pass."""
        memo[id(self)] = copied = Current()
        return copied


@dataclass(frozen=True)
class DynamicForward:
    """Replaces the `forward` of block `index`. `forward`: the masked form, which may be recomputed or compiled."""

    index: int
    block: nn.Module
    streams: Streams
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    current: Current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stream (B, N, D), in the form in which the block returns it."""
        x, c = self.streams.call(self.block, args, kwargs).args
        return self.streams.join([self.current.executor.run(self, x, c)])


def check_one_stream(stack: BlockStack) -> None:
    """Raise UserError if a block has more than one stream: routers decide on the tokens of one."""
    for name, streams in zip(stack.names(), stack.streams(), strict=True):
        if len(streams.names) > 1:
            raise UserError(
                f"a model whose blocks have one stream can have routers; block {name} has {', '.join(streams.names)}"
            )


def route(module: nn.Module, rules: DynamicRules, stack: BlockStack) -> None:
    """Replace the `forward` of all blocks, which have routers: the module's current executor runs them."""
    check_one_stream(stack)
    current = Current()
    module.get_submodule(rules.embedder).register_forward_hook(current.embedded)
    module.get_submodule(rules.labels).register_forward_hook(current.labelled)
    for index, (block, streams) in enumerate(zip(stack, stack.streams(), strict=True)):
        vars(block)["forward"] = DynamicForward(index, block, streams, MethodType(rules.masked, block), current)


# -------------------------------------------------------------------------------------------------- multiply-accumulates
# A block costs a + m: a = 4 N D I + 2 N^2 I for the attention (I = H d channels inside, D for a published model) and
# m = 2 N D M for the MLP (M hidden channels). With a share p of heads, q of groups and s of tokens it costs p a + q s m. The
# ratio of a model is the mean over its blocks, without other layers, modulations, norms and routers (the formulas reproduce the
# paper's table of three sizes at 256 pixels).


def block_ratio(masks: BlockMasks, sizes: BlockSizes, num: int) -> Tensor:
    """(B,) share of a block's multiply-accumulates under the decisions of `num` images, with always-on units."""
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


def total_macs(static: float, sizes: BlockSizes, depth: int, ratio: float, tokens: bool) -> float:
    """Multiply-accumulates of one forward pass of one image at a ratio of the blocks; `static`: those of the static model.

    Width routers are resolved before sampling and cost nothing. tokens: whether token routers run, outside of the ratio.
    """
    blocks = depth * (sizes.attention_macs + sizes.mlp_macs)
    hidden = max(1, sizes.width // TOKEN_ROUTER_SHRINK)
    routers = depth * sizes.num_tokens * (sizes.width * hidden + hidden) if tokens else 0
    return static - blocks * (1 - ratio) + routers
