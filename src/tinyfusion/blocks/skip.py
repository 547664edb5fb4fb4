"""Gates of exactly 0 or 1 without the wasted work of dense gating.

Dense gating computes `m * block(x) + (1 - m) * x` for every image. For m = 0 the block adds nothing, and its graph yields only
one number per image: the gradient of m, <g, block(x) - x>, with g the incoming gradient. So a batch is split: kept images run
with a graph, dropped ones without, or not at all if no gate requires a gradient. Values and gradients are those of the dense
form (TinyFusion, arXiv 2412.01199, section 3.2) up to rounding; the released code is dense. Only block(x) - x is retained for
the gates, not the two streams.

A block of several streams has one gate for all of them. Shapes: B images, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.forwards import standing_in
from tinyfusion.blocks.streams import BlockCall, Streams, mixed


@dataclass(frozen=True)
class GateColumn:
    """The gates of one block: m (B,), or (1,) for all images, and the indices of kept and dropped images.

    binary: every value is exactly 0 or 1. Other columns are mixed densely.
    """

    gate: Tensor
    kept: Tensor
    dropped: Tensor
    binary: bool


def gate_columns(gates: Tensor) -> list[GateColumn]:
    """gates (B, L), one column per block, with one transfer to the host for all."""
    values = gates.detach().cpu().T
    binary = ((values == 0) | (values == 1)).all(dim=1).tolist()
    num_kept = (values == 1).sum(dim=1).tolist()
    order = (values != 1).byte().argsort(dim=1, stable=True).to(gates.device)
    return [
        GateColumn(gate, rows[:num], rows[num:], exact)
        for gate, rows, num, exact in zip(gates.unbind(1), order, num_kept, binary, strict=True)
    ]


@dataclass(frozen=True)
class SkippingForward:
    """Replaces the `forward` of a gated block."""

    block: nn.Module
    streams: Streams
    forward: Callable[..., Any]
    column: GateColumn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.streams.call(self.block, args, kwargs)
        column, num = self.column, call.num_images
        if len(column.gate) not in (1, num):
            raise ValueError(f"the gates are for {len(column.gate)} images, the block got {num}")
        if not column.binary:
            outputs = self._run(call)
            return self.streams.join(
                [mixed(column.gate, *pair) for pair in zip(outputs, call.states, call.axes, strict=True)]
            )
        watched = torch.is_grad_enabled() and column.gate.requires_grad
        states: Sequence[Tensor | None]
        full: Sequence[Tensor | None]
        if len(column.dropped) == 0:
            states = full = self._run(call)
        else:
            # kept images first: autocast then caches casts of trained weights with a graph
            states = call.states if len(column.kept) == 0 else self._with_images(call, call.states, column.kept)
            full = self._with_dropped(call, states) if watched else states
            if len(column.kept) == 0:
                states = self._with_zero_gradients(call, states)
        mix = [
            self._gated(state, after, before, axis, watched)
            for state, after, before, axis in zip(states, full, call.states, call.axes, strict=True)
        ]
        return self.streams.join(mix)

    def _gated(
        self, state: Tensor | None, after: Tensor | None, before: Tensor | None, axis: int, watched: bool
    ) -> Tensor | None:
        """A stream in the dtype of its product with the gate and, if `watched`, with the gradient of the gate.

        after, before: output and input of the block for every image.
        """
        gate = self.column.gate
        if state is None or before is None or after is None:
            return state
        state = state.to(torch.promote_types(gate.dtype, state.dtype))
        if not watched:
            return state
        delta = after.detach() - before.detach()
        out: Tensor = _GateGradient.apply(state, gate.expand(state.shape[axis]), delta, axis)  # type: ignore[no-untyped-call]
        return out

    def _run(self, call: BlockCall) -> tuple[Tensor | None, ...]:
        return self.streams.split(self.forward(*call.args, **call.kwargs))

    def _with_dropped(self, call: BlockCall, states: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """`states` with the outputs of the block for the images it drops; no graph."""
        with torch.no_grad():
            if len(self.column.kept) == 0:
                return self._run(call)
            return self._with_images(call, [None if s is None else s.detach() for s in states], self.column.dropped)

    def _with_zero_gradients(self, call: BlockCall, states: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """`states`, with gradients of 0 for weights and inputs of a block that all images drop, as in dense gating.

        Without gradients (None) the moments of an optimiser would not decay. Inputs are included so that the graph has the
        same edges on every rank: a sharded model gathers and reduces in the order of its graph.
        """
        if not torch.is_grad_enabled():
            return states
        reached = [tensor for tensor in (*self.block.parameters(), *call.others()) if tensor.requires_grad]
        if not reached:
            return states
        first = next(index for index, state in enumerate(states) if state is call.tapped)
        out: Tensor = _ZeroGradients.apply(call.tapped, *reached)  # type: ignore[no-untyped-call]
        return [*states[:first], out, *states[first + 1 :]]

    def _with_images(self, call: BlockCall, states: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
        """`states` with the outputs of the block for the images `rows`; it runs only on them."""
        outputs = self._run(call.of_images(rows))
        return [_placed(*stream, rows) for stream in zip(states, outputs, call.axes, strict=True)]


def _placed(state: Tensor | None, values: Tensor | None, axis: int, rows: Tensor) -> Tensor | None:
    """`state` with `values` at the images `rows`, in their common dtype; None if the stream ends."""
    if state is None or values is None:
        return values
    dtype = torch.promote_types(state.dtype, values.dtype)
    return state.to(dtype).index_copy(axis, rows, values.to(dtype))


class _GateGradient(torch.autograd.Function):
    """The identity; in the backward pass the gate of image n gets <g_n, delta_n>, delta = block(x) - x; images along axis."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, gate: Tensor, delta: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(delta)
        ctx.gate_dtype, ctx.axis = gate.dtype, axis
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        upstream, (delta,) = gradients[0], ctx.saved_tensors
        sides = [values.transpose(0, ctx.axis).flatten(1) for values in (upstream, delta.to(upstream.dtype))]
        return upstream, torch.linalg.vecdot(*sides).to(ctx.gate_dtype), None, None


class _ZeroGradients(torch.autograd.Function):
    """The identity of the stream; in the backward pass every other tensor gets zeros."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(weight) for weight in ctx.weights)


@contextmanager
def skipping(block: nn.Module, streams: Streams, column: GateColumn) -> Iterator[None]:
    """Within the context `block` is gated by `column`, skipping what it can. Hooks on it see the mixed streams.

    Contexts nest: the gates multiply. Hooks on submodules run once for the kept and once for the dropped images.
    """
    outer = vars(block).get("forward")
    forward = SkippingForward(block, streams, block.forward, column)
    if isinstance(outer, SkippingForward):  # its column is for the whole batch
        (product,) = gate_columns((outer.column.gate * column.gate).unsqueeze(1))
        forward = replace(outer, column=product)
    with standing_in(block, forward):
        yield
