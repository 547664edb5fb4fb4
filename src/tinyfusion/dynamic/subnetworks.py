"""Sub-networks at inference: decisions of width are resolved for all timesteps before the first step, and weights sliced.

Width routers see the timestep alone, so every image of a step, and both halves of guidance, share one sub-network: no
router of width runs while sampling, and products are dense and smaller. Tokens are decided by content, per image, and
gathered over the flattened batch. The published release computes everything and multiplies by masks.

Weights. The units of a block are laid out once by how often they are on, those that never are left out. Where the masks of
a block are nested over time, as they then mostly are, every sub-network is a view of that layout; other masks get copies,
kept by mask up to `cache_bytes`. Neighbouring timesteps repeat masks. Packed weights (`blocks/packed.py`) have no views, so
there every mask has its copy.

Shapes: S timesteps, L blocks, H heads and groups.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.dynamics import BlockSlices, TokenMode, UnitKind, UnitSlices
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.blocks.packed import can_pack
from tinyfusion.blocks.routed import Complete, Deciding, DynamicForward
from tinyfusion.blocks.routers import is_router_key
from tinyfusion.core.compiler import compiling
from tinyfusion.core.errors import UserError
from tinyfusion.dynamic.modulations import ROWS_AHEAD, ModulationsAhead
from tinyfusion.models.loaded import DynamicModel, LoadedModel


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
    waits to learn the time; `check` says afterwards whether the calls were these. A processor reads the time from the tensor
    all the same (`reads_times`), and computes modulations ahead. A time that was not resolved is, when it comes, and
    remembered; a batch of different times has no sub-network and runs at full cost under masks.
    forms: compile passes over the stream with these, within `BlockStack.compiled`, which sets how many there may be; products
    stay library calls, as their shapes change with the timestep.
    """

    def __init__(
        self,
        dynamic: DynamicModel,
        tables: KeepTables,
        tokens: TokenMode = "gathered",
        calls: Sequence[float] | None = None,
        cache_bytes: int = 2 << 30,
        reads_times: bool | None = None,
        forms: CompiledForwards | None = None,
    ) -> None:
        depth, like = len(dynamic.stack), next(dynamic.module.parameters())
        if tables.heads.shape[1] != depth:
            raise UserError(f"the sub-networks are of {tables.heads.shape[1]} blocks, the model has {depth}")
        self.dynamic, self.tables, self.tokens = dynamic, tables, tokens
        self.calls = None if calls is None else [_rounded(t) for t in calls]
        on_processor = like.device.type == "cpu"
        self.reads_times = self.calls is None or (on_processor if reads_times is None else reads_times)
        self.ahead = ModulationsAhead(dynamic, self.calls) if self.reads_times and self.calls else None
        self.rows = {_rounded(t): row for row, t in enumerate(tables.timesteps)}
        self.weights = [
            SlicedWeights(
                dynamic, block, {"heads": tables.heads[:, i], "groups": tables.groups[:, i]}, cache_bytes // depth
            )
            for i, block in enumerate(dynamic.stack)
        ]
        routers = [getattr(block, "token_selection", None) for block in dynamic.stack]
        self.selections = [None if router is None else router.held_in(like.dtype) for router in routers]
        self.forms = forms
        self.row: int | None = 0
        self.mixed = Deciding()
        self.passes = self._begun = 0  # and the last pass whose modulations were looked for
        self._wrong: Tensor | int = 0
        self._done: Tensor | float = 0.0
        self._rows_run = 0

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """A forward pass at `t` (B,) begins."""
        self.passes += 1
        if not self.reads_times and self.calls is not None:
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
        kept, modulation = self.weights[index].of(heads, groups), self._modulation(dynamic, c, row)
        selection = self.selections[index]
        with compiling(f"block {index}"):
            out, count = self.dynamic.rules.sliced(
                dynamic.block, kept, x, modulation, selection, self.tokens, self._form
            )
        share_of_heads = kept.heads.number / sizes.num_heads
        share_of_groups = kept.groups.number / sizes.num_heads
        self._done = self._done + batch * sizes.attention_macs * share_of_heads
        self._done = self._done + count * (sizes.mlp_macs / tokens * share_of_groups)
        return out

    def _form(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.forms is None else self.forms.of(function, recomputed=False)

    def _modulation(self, dynamic: DynamicForward, c: Tensor, row: int) -> Tensor:
        labels = dynamic.current.labels
        if self.ahead is None or labels is None or not 0 < len(labels) == len(c) <= ROWS_AHEAD // 2:
            out: Tensor = dynamic.block.get_submodule(self.dynamic.rules.modulation)(c)
            return out
        if self._begun < self.passes:
            self._begun = self.passes
            self.ahead.begin(self.tables.timesteps[row], labels)
        return self.ahead.of(dynamic.index, dynamic.block)

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
    """The weights of the sub-networks of one block. masks: (S, H) of its heads and of its groups."""

    def __init__(self, dynamic: DynamicModel, block: nn.Module, masks: Mapping[UnitKind, Tensor], limit: int) -> None:
        self.rules, self.sizes, self.block, self.limit = dynamic.rules, dynamic.sizes, block, limit
        like = next(p for name, p in block.named_parameters() if not is_router_key(name))
        self.device, self.packed = like.device, can_pack(like.dtype, like.device)
        orders: dict[UnitKind, Tensor] = {kind: _order(found) for kind, found in masks.items()}
        self.ranks = {kind: _ranks(order, self.sizes.num_heads) for kind, order in orders.items()}
        # packed weights have no views: there is nothing to lay out before
        self.layout = {} if self.packed else {kind: self._taken(kind, order) for kind, order in orders.items()}
        self.copies: OrderedDict[tuple[UnitKind, bytes], UnitSlices] = OrderedDict()
        self.views: dict[tuple[UnitKind, int], UnitSlices] = {}

    @property
    def bytes(self) -> int:
        """Held beside the block's own."""
        return sum(slices.num_bytes for slices in (*self.layout.values(), *self.copies.values()))

    def of(self, heads: Tensor, groups: Tensor) -> BlockSlices:
        """The weights of these units: masks (H,) on the CPU."""
        return BlockSlices(self._of("heads", heads), self._of("groups", groups))

    def _of(self, kind: UnitKind, mask: Tensor) -> UnitSlices:
        first = None if self.packed else _prefix(mask, self.ranks[kind])
        if first is None:
            return self._copy(kind, mask)
        if (kind, first) not in self.views:
            self.views[kind, first] = self.layout[kind].first(first)
        return self.views[kind, first]

    def _taken(self, kind: UnitKind, units: Tensor) -> UnitSlices:
        return self.rules.slices(self.block, kind, units.to(self.device), self.sizes)

    def _copy(self, kind: UnitKind, mask: Tensor) -> UnitSlices:
        """Weights of a mask that is no prefix.

        Where there are too many the one used last goes: every trajectory asks for the same masks in the same order, so that
        one will be missed latest.
        """
        key = kind, mask.numpy().tobytes()
        if key in self.copies:
            self.copies.move_to_end(key)
            return self.copies[key]
        made = self._taken(kind, mask.nonzero().squeeze(1))
        self.copies[key] = made.packed() if self.packed else made
        while len(self.copies) > 2 and sum(slices.num_bytes for slices in self.copies.values()) > self.limit:
            del self.copies[list(self.copies)[-3]]  # two are in use: of heads and of groups
        return self.copies[key]


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
