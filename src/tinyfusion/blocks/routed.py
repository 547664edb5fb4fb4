"""Execution of blocks that have routers: what stands in for their `forward`, and the executors that it delegates to.

An executor decides as at inference (`Deciding`, the default), runs everything (`Complete`), runs under drawn noise (training,
`dynamic/train.py`), or runs sub-networks that were resolved before (`dynamic/subnetworks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from tinyfusion.blocks.dynamics import DynamicRules


class BlockExecutor(Protocol):
    """How the blocks of a model with routers run."""

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """The times (B,) of a forward pass and their embedding (B, D) are known."""
        ...

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """One block."""
        ...


class Complete:
    """Everything runs: the static model, bit for bit."""

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """Nothing to decide."""

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """The plain block."""
        return dynamic.forward(x, c)[0]


@dataclass(frozen=True)
class BlockMasks:
    """What was decided for one block: heads (B, H), groups (B, H), tokens (B, N), gate (B,); None: everything is on."""

    heads: Tensor | None = None
    groups: Tensor | None = None
    tokens: Tensor | None = None
    gate: Tensor | None = None


class Deciding:
    """Every image decides for itself, without noise, at full cost: the reference. `masks` are those of the last pass."""

    def __init__(self) -> None:
        self.embedding: Tensor | None = None
        self.masks: dict[int, BlockMasks] = {}

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """A pass begins."""
        self.embedding, self.masks = embedding, {}

    def noise(self, router: str, index: int) -> Tensor | None:
        """Noise of a router of block `index`; None decides as at inference, without gradients."""
        return None

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """The block with masks multiplied in."""
        if self.embedding is None or len(self.embedding) != len(x):  # a block by itself, which nothing was decided for
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
        """A copy of a model decides as at inference; what a pass has left behind stays with the original."""
        memo[id(self)] = copied = Current()
        return copied


@dataclass(frozen=True)
class DynamicForward:
    """What stands in for the `forward` of block `index`. `forward`: the masked form, which may be recomputed or compiled."""

    index: int
    block: nn.Module
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    current: Current

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        """The residual stream (B, N, D)."""
        return self.current.executor.run(self, x, c)


def route(module: nn.Module, rules: DynamicRules, blocks: Iterable[nn.Module]) -> None:
    """Replace the `forward` of blocks that have routers: from now on the module's current executor runs them."""
    current = Current()
    module.get_submodule(rules.embedder).register_forward_hook(current.embedded)
    module.get_submodule(rules.labels).register_forward_hook(current.labelled)
    for index, block in enumerate(blocks):
        vars(block)["forward"] = DynamicForward(index, block, MethodType(rules.masked, block), current)
