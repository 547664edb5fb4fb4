"""BlockStack: gate, watch, and remove the residual blocks of a model from outside; model files do not change.

Shapes: B samples, T tokens, D width. A block maps one or several streams, declared by `Streams`, to tensors of the same shapes;
without a declaration one, the first argument (B, T, D). Blocks are in one or several `ModuleList`s; their global index counts
through the lists in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from tinyfusion.blocks.forwards import RECOMPILE_LIMIT, CompiledForwards, changed, standing_in
from tinyfusion.blocks.skip import gate_columns, skipping
from tinyfusion.blocks.streams import Streams, mixed


class BlockStack:
    """An ordered view of the residual blocks of `model` in the lists named `lists`.

    streams: the declaration of the blocks per list; others have blocks of one stream.
    """

    def __init__(self, model: nn.Module, lists: Sequence[str], streams: Mapping[str, Streams] | None = None) -> None:
        self.model = model
        self.lists = tuple(lists)
        self._streams = dict(streams or {})
        self._compiled: dict[str, CompiledForwards] = {}

    def block_list(self, name: str) -> nn.ModuleList:
        blocks = self.model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList), f"{name} is not a list of blocks"
        return blocks

    def depths(self) -> dict[str, int]:
        return {name: len(self.block_list(name)) for name in self.lists}

    def __len__(self) -> int:
        return sum(self.depths().values())

    def __iter__(self) -> Iterator[nn.Module]:
        for name in self.lists:
            yield from self.block_list(name)

    def streams(self) -> list[Streams]:
        """The declaration of every block."""
        return [self._streams.get(name, Streams()) for name in self.lists for _ in self.block_list(name)]

    def names(self) -> list[str]:
        """The name of every block in the model, such as "blocks.3"."""
        return [f"{name}.{i}" for name in self.lists for i in range(len(self.block_list(name)))]

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within the context a block that runs with a graph retains only its arguments, and is recomputed in the backward pass.

        Values and gradients are those of the plain model bit for bit. The backward pass may come after the context. Nests with
        `gated`, `tap` and `compiled` in any order.
        """
        with self._standing_in(recomputed=True):
            yield

    @contextmanager
    def compiled(self, backend: str = "inductor") -> Iterator[None]:
        """Within the context the `forward` of every block is compiled, at the first call that needs it, as one graph.

        Blocks of a class share one compilation, and batch sizes do from the second on (one image alone has its own).
        Compilations are cached in this object. Hooks stay outside of the compiled code. Values agree up to rounding. Calls
        raise UserError, with the name of the block, if it cannot be compiled. backend: of `torch.compile`.
        """
        from torch._dynamo import config  # late: costs a second

        forwards = self._compiled.setdefault(backend, CompiledForwards(backend))
        with (
            # a block is smaller than the graphs into which DDP splits, and splits are incompatible with checkpoints
            config.patch(recompile_limit=RECOMPILE_LIMIT, optimize_ddp=False),
            self._standing_in(compiled=forwards),
        ):
            yield

    @contextmanager
    def _standing_in(self, **fields: Any) -> Iterator[None]:
        with ExitStack() as undo:
            for name, block in zip(self.names(), self, strict=True):
                undo.enter_context(standing_in(block, changed(block.forward, name, block, **fields)))
            yield

    @contextmanager
    def gated(self, gates: Tensor, dropped: Literal["dense", "skip"] = "dense") -> Iterator[None]:
        """Within the context block i computes `m_i * block(x) + (1 - m_i) * x`, per sample and on every stream.

        gates: (B, L) with L = len(self), any real values; 1 runs the block, 0 passes x through. Both are exact: ones
        equal the plain model bit for bit, zeros the model without the block. One row gates all samples alike.
        dropped: "dense" runs every block for every sample with a graph, as published. "skip" runs a block for the samples
        that drop it without a graph, or not at all if the gates require no gradient: the same values and gradients up to
        rounding, with less work (`blocks/skip.py`); values other than 0 and 1 stay dense.
        Source: TinyFusion (arXiv 2412.01199), section 3.2.
        """
        if gates.ndim != 2 or gates.shape[1] != len(self):
            raise ValueError(f"gates must be (batch, {len(self)}), one column per block; got {tuple(gates.shape)}")

        def hook(index: int, streams: Streams) -> Any:
            def mix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                call = streams.call(module, args, kwargs)
                states = zip(streams.split(output), call.states, call.axes, strict=True)
                return streams.join([mixed(gates[:, index], *state) for state in states])

            return mix

        with ExitStack() as undo:
            if dropped == "skip":
                for block, streams, column in zip(self, self.streams(), gate_columns(gates), strict=True):
                    undo.enter_context(skipping(block, streams, column))
            else:
                for i, (block, streams) in enumerate(zip(self, self.streams(), strict=True)):
                    undo.enter_context(block.register_forward_hook(hook(i, streams), with_kwargs=True))
            yield

    @contextmanager
    def tap(self, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the tapped streams (B, T, D) of the blocks at `indices`: {index: output}, filled as the model runs.

        Raises ValueError on an index out of range.
        """
        outputs: dict[int, Tensor] = {}
        outside = sorted({i for i in indices if not 0 <= i < len(self)})
        if outside:
            raise ValueError(f"cannot watch {outside}: out of range, the model has blocks 0 to {len(self) - 1}")

        with self.watched(indices, lambda index, _before, after: outputs.update({index: after})):
            yield outputs

    @contextmanager
    def watched(self, indices: Sequence[int], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
        """Call `see(index, before, after)` for every block at `indices` that runs in this context.

        before, after: the stream that the block's declaration names for comparisons, at its input and its output.
        """
        blocks, declared = list(self), self.streams()

        def hook(index: int) -> Any:
            def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                streams = declared[index]
                see(index, streams.call(module, args, kwargs).tapped, streams.tap(output))

            return show

        with ExitStack() as hooks:
            for i in sorted(set(indices)):
                hooks.enter_context(blocks[i].register_forward_hook(hook(i), with_kwargs=True))
            yield

    def keep(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Delete all blocks but `kept` (indices per list); the order stays, and they are renumbered from 0.

        Raises ValueError as `check_kept`.
        """
        check_kept(kept, self.depths())
        for name in self.lists:
            blocks = self.block_list(name)
            self.model.set_submodule(name, nn.ModuleList([blocks[i] for i in sorted(kept[name])]))


def check_kept(kept: Mapping[str, Sequence[int]], depths: Mapping[str, int]) -> None:
    """Raise ValueError unless `kept` has at least one block of every list, valid and distinct."""
    if set(kept) != set(depths):
        raise ValueError(f"kept must name the block lists {sorted(depths)}; got {sorted(kept)}")
    for name, indices in kept.items():
        depth = depths[name]
        outside = [i for i in indices if not 0 <= i < depth]
        if outside:
            raise ValueError(f"kept {name} {outside} out of range: the model has blocks 0 to {depth - 1}")
        twice = sorted({i for i in indices if list(indices).count(i) > 1})
        if twice:
            raise ValueError(f"kept {name} {twice} named twice; name every block once")
        if not indices:
            raise ValueError(f"kept {name} is empty: at least one block must stay")


def frozen(module: nn.Module) -> nn.Module:
    """`module` in eval mode with no gradients: a teacher."""
    return module.eval().requires_grad_(False)


def num_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, fixed position table included unless `trainable_only`."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)
