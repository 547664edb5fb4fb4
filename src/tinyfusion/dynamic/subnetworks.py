"""Sub-networks at inference: resolve width decisions for all timesteps before the first step, and slice the weights.

Width routers see the timestep alone, so all images of a step and both halves of guidance share one sub-network: no width
router runs while sampling, and products are dense and smaller. Tokens are decided per image and gathered over the
flattened batch. The published release computes everything and multiplies by masks.

Weights: the units of a block are sorted once by how often they are on, without those that never are. If the masks of a block
are nested over time, which is common, every sub-network is a view of that layout; other masks get copies, cached by mask up to
`cache_bytes`. Packed weights (`blocks/packed.py`) have no views, so every mask has a copy.

Modulations depend on time and label alone. With few images their cost is that of reading the weights, a third of the model's,
which do not shrink with the block: at half the width and two images a tenth of the time. The times of a trajectory are known at
its first step, so the weights are read once for several steps.

Shapes: B images, D width, S timesteps, L blocks, H heads and groups, K times computed together.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.dynamics import BlockSlices, Complete, Deciding, DynamicForward, TokenMode, UnitKind, UnitSlices
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.blocks.packed import can_pack
from tinyfusion.blocks.routers import is_router_key
from tinyfusion.core.compiler import compiling
from tinyfusion.core.errors import UserError
from tinyfusion.models.loaded import DynamicModel, LoadedModel

ROWS_AHEAD = 32  # K * B: as fast as one row on a CPU


@dataclass(frozen=True)
class KeepTables:
    """The units that run at each timestep: heads and groups (S, L, H), blocks (S, L), bool, on the CPU."""

    timesteps: tuple[float, ...]
    heads: Tensor
    groups: Tensor
    blocks: Tensor

    def joined(self, other: KeepTables) -> KeepTables:
        return KeepTables(
            (*self.timesteps, *other.timesteps),
            *(torch.cat([getattr(self, n), getattr(other, n)]) for n in ("heads", "groups", "blocks")),
        )

    def report(self) -> dict[str, float | int]:
        """Number of timesteps and of distinct sub-networks, and mean shares of heads, groups and blocks that run."""
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
    """Evaluate the width and depth routers at `timesteps`, in the network's units. Call it before casting the model: float32."""
    like = next(dynamic.embedder.parameters())
    t = torch.tensor(list(timesteps), dtype=torch.float32, device=like.device)
    with dynamic.using(Complete()):
        embedding = dynamic.embedder(t)
    depth, heads = len(dynamic.stack), dynamic.sizes.num_heads
    tables = []
    for name, units in (("attn_rate", (heads,)), ("mlp_rate", (heads,)), ("block_rate", ())):
        routers = [getattr(block, name) for block in dynamic.stack if hasattr(block, name)]
        on = [router(embedding).cpu() > 0.5 for router in routers]
        tables.append(torch.stack(on, dim=1) if on else torch.ones(len(t), depth, *units, dtype=torch.bool))
    return KeepTables(tuple(t.tolist()), *tables)


class SubNetworks:
    """Execution mode of a dynamic model for sampling without gradients; enter it with `dynamic.using`.

    calls: time of every forward pass of a trajectory, in order, repeated. On an accelerator the host then never waits to
    read the time, and `check` verifies the times afterwards; on a CPU it is read from the tensor (`reads_times`), and
    modulations are computed for several steps at once. Other times are resolved when they occur; a batch of different times has
    no sub-network and runs at full cost under masks. forms: compiled elementwise passes, to be used within
    `BlockStack.compiled`; products stay library calls, because their shapes change with the timestep.
    Raises UserError if the tables are for another depth.
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
        masks = zip(tables.heads.unbind(1), tables.groups.unbind(1), strict=True)
        self.weights = [
            SlicedWeights(dynamic, block, {"heads": heads, "groups": groups}, cache_bytes // depth)
            for block, (heads, groups) in zip(dynamic.stack, masks, strict=True)
        ]
        routers = [getattr(block, "token_selection", None) for block in dynamic.stack]
        self.selections = [None if router is None else router.held_in(like.dtype) for router in routers]
        self.forms = forms
        self.row: int | None = 0
        self.mixed = Deciding()
        self.passes = self._begun = 0  # and the last pass for which modulations were started
        self._wrong: Tensor | int = 0
        self._done: Tensor | float = 0.0
        self._rows_run = 0

    def begin(self, t: Tensor, embedding: Tensor) -> None:
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
        index, row, sizes = dynamic.index, self.row, self.dynamic.sizes
        batch, tokens = x.shape[:2]
        self._rows_run += batch
        if row is None:
            self._done = self._done + batch * (sizes.attention_macs + sizes.mlp_macs)
            return self.mixed.run(dynamic, x, c)
        if not self.tables.blocks[row, index]:
            return x
        heads, groups = self.tables.heads[row, index], self.tables.groups[row, index]
        slices, modulation = self.weights[index].of(heads, groups), self._modulation(dynamic, c, row)
        selection = self.selections[index]
        with compiling(f"block {index}"):
            out, count = self.dynamic.rules.sliced(
                dynamic.block, slices, x, modulation, selection, self.tokens, self._form
            )
        heads_on, groups_on = (units.number / sizes.num_heads for units in (slices.heads, slices.groups))
        self._done = self._done + batch * sizes.attention_macs * heads_on
        self._done = self._done + count * (sizes.mlp_macs / tokens * groups_on)
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
        """Share of the blocks' multiply-accumulates that ran, mean over all passes and images. Raises UserError before the first."""
        if not self._rows_run:
            raise UserError("nothing has run in these sub-networks yet")
        return float(self._done) / (self._rows_run * (self.dynamic.sizes.attention_macs + self.dynamic.sizes.mlp_macs))

    def check(self) -> None:
        """Raise UserError if forward passes were not at the times of `calls`; the images are wrong then."""
        if int(self._wrong):
            raise UserError(f"{int(self._wrong)} forward passes were at other times than the sampler had announced")

    def report(self) -> dict[str, float | int]:
        """The tables' report, number of forward passes, achieved ratio, and bytes of sliced weights."""
        extra_bytes = sum(weights.bytes for weights in self.weights)
        return {**self.tables.report(), "passes": self.passes, "macs_ratio": self.ratio, "extra_bytes": extra_bytes}


def _rounded(t: float) -> float:
    return float(torch.tensor(t, dtype=torch.float32))


class SlicedWeights:
    """Weights of all sub-networks of one block. masks: (S, H) of its heads and of its groups."""

    def __init__(self, dynamic: DynamicModel, block: nn.Module, masks: Mapping[UnitKind, Tensor], limit: int) -> None:
        self.rules, self.sizes, self.block, self.limit = dynamic.rules, dynamic.sizes, block, limit
        like = next(p for name, p in block.named_parameters() if not is_router_key(name))
        self.device, self.packed = like.device, can_pack(like.dtype, like.device)
        orders: dict[UnitKind, Tensor] = {kind: _order(mask) for kind, mask in masks.items()}
        self.ranks = {kind: _ranks(order, self.sizes.num_heads) for kind, order in orders.items()}
        # packed weights have no views, so there is no layout
        self.layout = {} if self.packed else {kind: self._taken(kind, order) for kind, order in orders.items()}
        self.copies: OrderedDict[tuple[UnitKind, bytes], UnitSlices] = OrderedDict()
        self.views: dict[tuple[UnitKind, int], UnitSlices] = {}

    @property
    def bytes(self) -> int:
        """Bytes of layouts and copies, in addition to the block's own weights."""
        return sum(slices.num_bytes for slices in (*self.layout.values(), *self.copies.values()))

    def of(self, heads: Tensor, groups: Tensor) -> BlockSlices:
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
        """Weights of a mask that is not a prefix of the layout.

        Beyond the limit the most recently used copy is evicted: trajectories repeat the order of masks, so it is needed last.
        """
        key = kind, mask.numpy().tobytes()
        if key in self.copies:
            self.copies.move_to_end(key)
            return self.copies[key]
        slices = self._taken(kind, mask.nonzero().squeeze(1))
        self.copies[key] = slices.packed() if self.packed else slices
        while len(self.copies) > 2 and sum(copy.num_bytes for copy in self.copies.values()) > self.limit:
            del self.copies[list(self.copies)[-3]]  # two are in use: of heads and of groups
        return self.copies[key]


def _order(masks: Tensor) -> Tensor:
    """Units that are on in any mask (S, H), most frequent first."""
    often = masks.sum(0)
    order = often.argsort(descending=True, stable=True)
    return order[: int((often > 0).sum())]


def _ranks(order: Tensor, num: int) -> Tensor:
    """(num,) position of every unit in `order`; `num` for units that are not in it."""
    ranks = torch.full((num,), num, dtype=torch.int64)
    ranks[order] = torch.arange(len(order))
    return ranks


def _prefix(mask: Tensor, ranks: Tensor) -> int | None:
    """Length of the prefix of the layout that equals `mask`, or None if it is not a prefix."""
    count = int(mask.sum())
    return count if count == 0 or int(ranks[mask].max()) == count - 1 else None


class ModulationsAhead:
    """Modulations of every block for forward passes on a CPU; `calls`: the times of a trajectory in order.

    Passes in another order, at other times or with other labels get the same values, computed step by step.
    """

    def __init__(self, dynamic: DynamicModel, calls: Sequence[float]) -> None:
        self.dynamic, self.calls = dynamic, list(calls)
        self.call = -1  # index of the current pass in `calls`
        self.times: list[float] = []
        self.step = -1  # index of the current pass in `times`
        self.labels: Tensor | None = None
        self.conditions = torch.empty(0)  # (K * B, D)
        self.cached: dict[int, Tensor] = {}  # per block (K, B, modulation)

    def begin(self, time: float, labels: Tensor) -> None:
        """Start a forward pass at this time with label embeddings (B, D), B at most `ROWS_AHEAD`."""
        self._place(time)
        ahead = self.step + 1 < len(self.times) and self.times[self.step + 1] == time
        if ahead and self.labels is not None and torch.equal(self.labels, labels):
            self.step += 1
            return
        many = ROWS_AHEAD // len(labels)
        self.times = [time] if self.call < 0 else self.calls[self.call : self.call + many]
        self.step, self.labels, self.cached = 0, labels, {}
        times = torch.tensor(self.times, device=labels.device)
        embedding = self.dynamic.embedder.forward(times)  # bypasses the hook that starts a pass
        self.conditions = (embedding.unsqueeze(1) + labels).flatten(0, 1)

    def _place(self, time: float) -> None:
        following = (self.call + 1) % len(self.calls)
        if self.calls[following] == time:
            self.call = following
        else:
            self.call = self.calls.index(time) if time in self.calls else -1

    def of(self, index: int, block: nn.Module) -> Tensor:
        """(B, modulation) of a block in the current pass."""
        if index not in self.cached:
            layer = block.get_submodule(self.dynamic.rules.modulation)
            self.cached[index] = layer(self.conditions).unflatten(0, (len(self.times), -1))
        return self.cached[index][self.step]


class TimestepRecorder(nn.Module):
    """A network that returns zeros and records the times of its forward passes in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []
        self.like = nn.Parameter(torch.zeros(()), requires_grad=False)  # callers read dtype and device from a parameter

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append(float(t.flatten()[0]))
        return torch.zeros_like(x)


def rehearsed(model: LoadedModel, trajectory: Callable[[LoadedModel], Iterable[Tensor]]) -> list[float]:
    """Times at which a sampler calls the network, in order, from a run on one image with a network of zeros.

    trajectory: the sampler's, for a given model, on the CPU. For adaptive methods the times are approximate: use them for
    `resolve`, not for `SubNetworks(calls=)`.
    """
    recorder = TimestepRecorder()
    deque(trajectory(dataclasses.replace(model, module=recorder)), maxlen=0)
    return recorder.calls
