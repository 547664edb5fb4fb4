"""Sub-networks at inference: decisions of width are resolved for all timesteps before the first step, and weights sliced.

Width routers see the timestep alone, so every image of a step, and both halves of guidance, share one sub-network: no
router of width runs while sampling, and products are dense and smaller. Tokens are decided by content, per image, and
gathered over the flattened batch. The published release computes everything and multiplies by masks.

Weights. The units of a block are laid out once by how often they are on, those that never are left out. Where the masks of
a block are nested over time, as they then mostly are, every sub-network is a view of that layout; other masks get copies,
kept by mask up to `cache_bytes`. Neighbouring timesteps repeat masks.

Shapes: S timesteps, L blocks, H heads and groups.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.models.attach import Complete, Deciding, DynamicForward, DynamicModel
from tinyfusion.models.dynamics import BlockSlices, TokenMode
from tinyfusion.models.loaded import LoadedModel


@dataclass(frozen=True)
class KeepTables:
    """Which units run at which timestep: heads and groups (S, L, H), blocks (S, L), bool, on the CPU."""

    timesteps: tuple[float, ...]
    heads: Tensor
    groups: Tensor
    blocks: Tensor

    def joined(self, other: KeepTables) -> KeepTables:
        """With the rows of `other` behind."""
        return KeepTables(
            (*self.timesteps, *other.timesteps),
            *(torch.cat([getattr(self, n), getattr(other, n)]) for n in ("heads", "groups", "blocks")),
        )

    def report(self) -> dict[str, float | int]:
        """What a claim of speed should say: timesteps, different sub-networks, and the mean share of everything kept."""
        whole = torch.cat([self.heads.flatten(1), self.groups.flatten(1), self.blocks], dim=1)
        gate = self.blocks.unsqueeze(-1)
        return {
            "timesteps": len(self.timesteps),
            "sub_networks": len(whole.unique(dim=0)),
            "mean_heads": float((self.heads & gate).float().mean()),
            "mean_groups": float((self.groups & gate).float().mean()),
            "mean_blocks": float(self.blocks.float().mean()),
        }


@torch.no_grad()
def resolve(dynamic: DynamicModel, timesteps: Sequence[float]) -> KeepTables:
    """The decisions at these times, as the network is given them. Resolve in float32, before a model is cast."""
    like = next(dynamic.embedder.parameters())
    t = torch.tensor(list(timesteps), dtype=torch.float32, device=like.device)
    with dynamic.using(Complete()):
        embedding = dynamic.embedder(t)
    depth, heads = len(dynamic.stack), dynamic.sizes.num_heads
    columns: dict[str, list[Tensor]] = {"attn_rate": [], "mlp_rate": [], "block_rate": []}
    for block in dynamic.stack:
        for name, found in columns.items():
            if hasattr(block, name):
                found.append(getattr(block, name)(embedding).cpu() > 0.5)
    shapes = {"attn_rate": (len(t), depth, heads), "mlp_rate": (len(t), depth, heads), "block_rate": (len(t), depth)}
    tables = [
        torch.stack(found, dim=1) if found else torch.ones(shapes[name], dtype=torch.bool)
        for name, found in columns.items()
    ]
    return KeepTables(tuple(t.tolist()), *tables)


class SubNetworks:
    """A way to run a dynamic model, for sampling: enter it with `dynamic.using`. No gradients.

    calls: the time of every forward pass of a trajectory, in order, over and over. On an accelerator the host then never
    waits to learn the time; `check` says afterwards whether the calls were these. Without it the time is read from the
    tensor. A time that was not resolved is, when it comes, and remembered; a batch of different times has no sub-network and
    runs at full cost under masks.
    """

    def __init__(
        self,
        dynamic: DynamicModel,
        tables: KeepTables,
        tokens: TokenMode = "gathered",
        calls: Sequence[float] | None = None,
        cache_bytes: int = 2 << 30,
    ) -> None:
        depth = len(dynamic.stack)
        if tables.heads.shape[1] != depth:
            raise UserError(f"the sub-networks are of {tables.heads.shape[1]} blocks, the model has {depth}")
        self.dynamic, self.tables, self.tokens = dynamic, tables, tokens
        self.calls = None if calls is None else [_rounded(t) for t in calls]
        self.rows = {_rounded(t): row for row, t in enumerate(tables.timesteps)}
        self.weights = [
            SlicedWeights(dynamic, block, tables.heads[:, i], tables.groups[:, i], cache_bytes // depth)
            for i, block in enumerate(dynamic.stack)
        ]
        self.row: int | None = 0
        self.mixed = Deciding()
        self.passes = 0
        self._wrong: Tensor | int = 0
        self._done: Tensor | float = 0.0
        self._rows_run = 0

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """A forward pass at `t` (B,) begins."""
        self.passes += 1
        if self.calls is not None:
            time = self.calls[(self.passes - 1) % len(self.calls)]
            self._wrong = self._wrong + (t.float() != time).any()
        else:
            low, high = t.float().aminmax()
            time = _rounded(float(low))
            if low != high:
                self.row = None
                self.mixed.begin(t, embedding)
                return
        if time not in self.rows:
            self.rows[time] = len(self.tables.timesteps)
            self.tables = self.tables.joined(resolve(self.dynamic, [time]))
        self.row = self.rows[time]

    @torch.no_grad()
    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """One block of the sub-network."""
        index, row, sizes = dynamic.index, self.row, self.dynamic.sizes
        batch, tokens = x.shape[:2]
        self._rows_run += batch
        if row is None:
            self._done = self._done + batch * (sizes.attention_macs + sizes.mlp_macs)
            return self.mixed.run(dynamic, x, c)
        if not self.tables.blocks[row, index]:
            return x
        heads, groups = self.tables.heads[row, index], self.tables.groups[row, index]
        selection = getattr(dynamic.block, "token_selection", None)
        kept = self.weights[index].of(heads, groups)
        out, count = self.dynamic.rules.sliced(dynamic.block, kept, x, c, selection, self.tokens)
        share_of_heads = kept.num_heads / sizes.num_heads
        share_of_groups = len(kept.fc1) / sizes.mlp_width
        self._done = self._done + batch * sizes.attention_macs * share_of_heads
        self._done = self._done + count * (sizes.mlp_macs / tokens * share_of_groups)
        return out

    @property
    def ratio(self) -> float:
        """Multiply-accumulates of the blocks that ran as a share of all: mean over all passes and images so far."""
        if not self._rows_run:
            raise UserError("nothing has run in these sub-networks yet")
        return float(self._done) / (self._rows_run * (self.dynamic.sizes.attention_macs + self.dynamic.sizes.mlp_macs))

    def check(self) -> None:
        """Raise UserError where the forward passes were not at the times of `calls`: the images are then wrong."""
        if int(self._wrong):
            raise UserError(f"{int(self._wrong)} forward passes were at other times than the sampler had announced")

    def report(self) -> dict[str, float | int]:
        """What ran: the tables' report, forward passes, the achieved ratio, and bytes of weights beside the model's own."""
        held = sum(weights.bytes for weights in self.weights)
        return {**self.tables.report(), "passes": self.passes, "macs_ratio": self.ratio, "extra_bytes": held}


def _rounded(t: float) -> float:
    """A time as float32 holds it, which is how tensors bring it."""
    return float(torch.tensor(t, dtype=torch.float32))


class SlicedWeights:
    """The weights of the sub-networks of one block."""

    def __init__(self, dynamic: DynamicModel, block: nn.Module, heads: Tensor, groups: Tensor, limit: int) -> None:
        self.rules, self.sizes, self.block, self.limit = dynamic.rules, dynamic.sizes, block, limit
        self.device = next(block.parameters()).device
        self.orders = _order(heads), _order(groups)
        self.layout = self._slices(*self.orders)
        self.ranks = [_ranks(order, self.sizes.num_heads) for order in self.orders]
        self.copies: OrderedDict[tuple[str, bytes], BlockSlices] = OrderedDict()
        self.views: dict[tuple[int, int], BlockSlices] = {}

    @property
    def bytes(self) -> int:
        """Of all weights held here."""
        return _bytes(self.layout) + sum(map(_bytes, self.copies.values()))

    def of(self, heads: Tensor, groups: Tensor) -> BlockSlices:
        """The weights of these units: masks (H,) on the CPU."""
        first_heads, first_groups = (_prefix(m, ranks) for m, ranks in zip((heads, groups), self.ranks, strict=True))
        found = self._view(first_heads or 0, first_groups or 0)
        if first_heads is None:
            own = self._copy("heads", heads)
            found = dataclasses.replace(
                found, num_heads=own.num_heads, qkv=own.qkv, qkv_bias=own.qkv_bias, proj=own.proj
            )
        if first_groups is None:
            own = self._copy("groups", groups)
            found = dataclasses.replace(found, fc1=own.fc1, fc1_bias=own.fc1_bias, fc2=own.fc2)
        return found

    def _view(self, heads: int, groups: int) -> BlockSlices:
        if (heads, groups) not in self.views:
            self.views[heads, groups] = self.rules.prefix(self.layout, heads, groups, self.sizes)
        return self.views[heads, groups]

    def _slices(self, heads: Tensor, groups: Tensor) -> BlockSlices:
        return self.rules.slices(self.block, heads.to(self.device), groups.to(self.device), self.sizes)

    def _copy(self, kind: str, mask: Tensor) -> BlockSlices:
        """Weights of a mask that is no prefix; the one used longest ago goes where there are too many."""
        key = kind, mask.numpy().tobytes()
        if key in self.copies:
            self.copies.move_to_end(key)
            return self.copies[key]
        units, none = mask.nonzero().squeeze(1), torch.zeros(0, dtype=torch.int64)
        made = self._slices(units, none) if kind == "heads" else self._slices(none, units)
        self.copies[key] = made
        while len(self.copies) > 1 and sum(map(_bytes, self.copies.values())) > self.limit:
            self.copies.popitem(last=False)
        return made


def _order(masks: Tensor) -> Tensor:
    """Units of masks (S, H) that are ever on, the most frequent first."""
    often = masks.sum(0)
    order = often.argsort(descending=True, stable=True)
    return order[: int((often > 0).sum())]


def _ranks(order: Tensor, num: int) -> Tensor:
    """(num,) place of every unit in `order`; `num` for those that are not in it."""
    ranks = torch.full((num,), num, dtype=torch.int64)
    ranks[order] = torch.arange(len(order))
    return ranks


def _prefix(mask: Tensor, ranks: Tensor) -> int | None:
    """How many of the first units of the layout `mask` is, or None where it is another choice."""
    count = int(mask.sum())
    return count if count == 0 or int(ranks[mask].max()) == count - 1 else None


def _bytes(slices: BlockSlices) -> int:
    tensors: list[Any] = [getattr(slices, field.name) for field in dataclasses.fields(slices)]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class TimestepRecorder(nn.Module):
    """Stands in for a network: gives zeros, and `calls` are the times of its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []
        self.like = nn.Parameter(torch.zeros(()), requires_grad=False)  # callers ask a parameter for type and device

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Zeros shaped as `x`."""
        self.calls.append(float(t.flatten()[0]))
        return torch.zeros_like(x)


def rehearsed(model: LoadedModel, trajectory: Callable[[LoadedModel], Iterable[Tensor]]) -> list[float]:
    """The times at which a sampler calls the network, in order: rehearse it on one image with a network of zeros.

    trajectory: makes the sampler's trajectory with the model that it is given, on the CPU. The order is that of every later
    run for rules of fixed steps; of adaptive ones it is a guess, good for `resolve` and not for `SubNetworks(calls=)`.
    """
    recorder = TimestepRecorder()
    deque(trajectory(dataclasses.replace(model, module=recorder)), maxlen=0)
    return recorder.calls
